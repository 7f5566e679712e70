"""What is right: the user's own model, run eagerly and slowly with hooks on its blocks.

Of the package it knows the roles of the blocks' arguments and the routers' weights, nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.supported_models.record import first_line
from benchmarks.supported_models.settings import PARITY


def rebuilt(tree: Any, edit: Callable[[tuple[Any, ...], Any], Any], path: Any = ()) -> Any:
    """A copy of nested tuples, lists and dicts with ``edit(path, leaf)`` in place of each leaf."""
    if isinstance(tree, dict):
        return {key: rebuilt(value, edit, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [rebuilt(value, edit, (*path, place)) for place, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return edit(path, tree)


def at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of an output, in order; the output classes of diffusers are dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = vars(tree).values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [tensor for child in tree for tensor in tensors(child)]


def rows_of(kept: Tensor, start: int, num_tokens: int, length: int) -> Tensor:
    """Rows of an axis of `length` that stay: the image tokens `kept`, and all other tokens."""
    return torch.cat(
        [torch.arange(start), start + kept, torch.arange(start + num_tokens, length)]
    )


def picked(leaf: Tensor, axis: int, kept: Tensor, role: Any, num_tokens: int) -> Tensor:
    rows = rows_of(kept, role.start, num_tokens, leaf.shape[axis])
    return leaf[(slice(None),) * axis + (rows,)]


def roles_of(spec: Any, path: Any) -> list[Any]:
    return [role for role in (spec.stream, *spec.aligned) if role.path == path]


def sample_by_sample(
    forward: Callable[..., Any], tree: Any, spec: Any, kept: Tensor
) -> list[Any]:
    """Outputs of the block, run on one sample and its kept tokens after the other."""
    batch = len(kept)

    def run(sample: int) -> Any:
        def cut(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            roles = roles_of(spec, path)
            is_table = any(role.axis == 0 or not role.batched for role in roles)
            if leaf.ndim and leaf.shape[0] == batch and not is_table:
                leaf = leaf[sample : sample + 1]
            for role in roles:
                leaf = picked(leaf, role.axis, kept[sample], role, spec.num_tokens)
            return leaf

        args, kwargs = rebuilt(tree, cut)
        return forward(*args, **kwargs)

    return [run(sample) for sample in range(batch)]


def batch_at_once(
    forward: Callable[..., Any], tree: Any, spec: Any, kept: Tensor
) -> list[Any]:
    """The same for a block that does not run on one sample: all of them in one call."""

    def cut(path: Any, leaf: Any) -> Any:
        for role in roles_of(spec, path):
            if not role.batched:
                leaf = picked(leaf, role.axis, kept[0], role, spec.num_tokens)
            elif role.axis == 0:  # a table without a batch axis: a copy for each sample
                leaf = torch.stack([picked(leaf, 0, k, role, spec.num_tokens) for k in kept])
            else:
                samples = leaf if len(leaf) == len(kept) else [leaf[0]] * len(kept)
                leaf = torch.stack(
                    [
                        picked(one, role.axis - 1, k, role, spec.num_tokens)
                        for one, k in zip(samples, kept, strict=True)
                    ]
                )
        return leaf

    args, kwargs = rebuilt(tree, cut)
    return [forward(*args, **kwargs)]


def put_back(results: list[Any], stream: Tensor, spec: Any, kept: Tensor) -> Any:
    """A block's outputs, whole again: bypassed tokens are those of the stream, zeros for a part."""

    def join(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        parts = [at(result, path) for result in results]
        if tuple(path) != tuple(spec.output):
            # batch 1 says that the output has a batch axis; anything else is the same each time
            joined = len(parts) > 1 and leaf.ndim > 0 and len(leaf) == 1
            return torch.cat(parts) if joined else leaf
        whole = torch.zeros_like(stream) if spec.bypass == "zeros" else stream.clone()
        for sample, processed in enumerate(torch.cat(parts)):
            rows = rows_of(kept[sample], spec.stream.start, spec.num_tokens, stream.shape[1])
            whole[sample, rows] = processed
        return whole

    return rebuilt(results[0], join)


def turned(tree: Any, paths: Sequence[Any], turn: Callable[[Tensor], Tensor]) -> Any:
    return rebuilt(tree, lambda path, leaf: turn(leaf) if tuple(path) in paths else leaf)


def turns(view: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From the layout of a block's streams to (batch, tokens, channels), and back."""
    if view.layout == "tokens_first":
        return lambda t: t.swapaxes(0, 1), lambda t: t.swapaxes(0, 1)
    return lambda t: t[None], lambda t: t[0]


def turned_block(forward: Callable[..., Any], view: Any) -> Callable[..., Any]:
    """A block called with its streams as (batch, tokens, channels)."""
    there, back = turns(view)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = turned((args, kwargs), view.inputs, back)
        return turned(forward(*args, **kwargs), view.outputs, there)

    return call


def slow_block(
    forward: Callable[..., Any], tree: Any, dense: Any, spec: Any, weight: Tensor, kept: int
) -> tuple[Any, float]:
    """(what the block returns with only its `kept` best tokens processed, distance to a tie).

    The way to run it is the first that gives the block's own `dense` output with every token kept.
    """
    if spec.view is not None:
        view, plain = spec.view, dataclasses.replace(spec, view=None)
        there, back = turns(view)
        tree, dense = turned(tree, view.inputs, there), turned(dense, view.outputs, there)
        forward = turned_block(forward, view)
        result, distance = slow_block(forward, tree, dense, plain, weight, kept)
        return turned(result, view.outputs, back), distance
    stream: Tensor = at(tree, spec.stream.path)
    first, num_tokens = spec.stream.start, spec.num_tokens
    scores = torch.stack([s[first : first + num_tokens].float() @ weight for s in stream])
    if any(not role.batched for role in spec.aligned):  # one choice for the whole batch
        scores = scores.mean(0, keepdim=True).expand(len(stream), -1)
    ranked = scores.sort(dim=1, descending=True, stable=True)
    distance = float("inf")
    if kept < num_tokens:
        border = ranked.values[:, kept - 1] - ranked.values[:, kept]
        distance = float((border / scores.abs().amax(1).clamp_min(1e-30)).min())
    every = torch.arange(num_tokens).expand(len(stream), -1)
    problems = []
    for run in (sample_by_sample, batch_at_once):
        try:
            whole = put_back(run(forward, tree, spec, every), stream, spec, every)
            if relative(tensors(whole), tensors(dense)) > PARITY:
                problems.append(f"{run.__name__} does not give the dense output")
                continue
            best = ranked.indices[:, :kept]
            return put_back(run(forward, tree, spec, best), stream, spec, best), distance
        except Exception as error:  # noqa: BLE001 - the user's block may raise anything
            problems.append(f"{run.__name__}: {first_line(error)}")
    raise RuntimeError(f"the reference cannot run {spec.name}: {'; '.join(problems)}")


@contextlib.contextmanager
def slowly_routed(
    model: nn.Module, specs: Iterable[Any], weights: Mapping[str, Tensor], ratio: float
) -> Iterator[list[float]]:
    """Hooks on the blocks of `model` while the context lasts; yields each block's distance to a tie."""
    distances: list[float] = []
    handles = []

    def add(spec: Any, block: nn.Module) -> None:
        calls: list[Any] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(rebuilt((args, kwargs), cloned))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            kept = round(ratio * spec.num_tokens)
            result, distance = slow_block(
                block.forward, calls.pop(), output, spec, weights[spec.name], kept
            )
            distances.append(distance)
            return result

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))

    try:
        for spec in specs:
            add(spec, model.get_submodule(spec.name))
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def cloned(_: Any, leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def permutation_errors(
    model: nn.Module, inputs: dict[str, Any], specs: Sequence[Any]
) -> dict[str, float]:
    """Block -> how far "permuted tokens in" is from "permuted tokens out", as share of its change."""
    calls: dict[str, Any] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = rebuilt((args, kwargs), cloned)

        return record

    handles = [
        model.get_submodule(spec.name).register_forward_pre_hook(
            recorder(spec.name), with_kwargs=True
        )
        for spec in specs
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(11)
    found = {}
    for spec in specs:
        block, tree = model.get_submodule(spec.name), calls[spec.name]
        unread = _unread_outputs(model, inputs, spec)
        try:
            found[spec.name] = _permutation_error(block, tree, spec, generator, unread, True)
        except RuntimeError:  # it casts to a type of its own inside
            found[spec.name] = _permutation_error(block, tree, spec, generator, unread, False)
    return found


def _unread_outputs(model: nn.Module, inputs: dict[str, Any], spec: Any) -> set[Any]:
    """Outputs of a block beside its stream that may be NaN without anybody noticing."""
    block, paths = model.get_submodule(spec.name), []

    def run(spoiled: Any) -> list[Tensor]:
        def spoil(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            paths.append(tuple(path))
            return torch.full_like(leaf, float("nan")) if tuple(path) == spoiled else leaf

        handle = block.register_forward_hook(lambda _, args, output: rebuilt(output, spoil))
        try:
            return tensors(model(**copy.deepcopy(inputs)))
        finally:
            handle.remove()

    dense = run(None)
    others = set(paths) - {tuple(spec.output)}
    return {path for path in others if equal(run(path), dense)}


def _permutation_error(
    block: nn.Module,
    tree: Any,
    spec: Any,
    generator: torch.Generator,
    unread: set[Any],
    wide: bool,
) -> float:
    held = [value for part in block.modules() for value in vars(part).values()]
    # TorchScript does not copy its functions
    block = copy.deepcopy(
        block, {id(h): h for h in held if isinstance(h, torch.jit.ScriptFunction)}
    )
    if wide:
        block, tree = block.double(), rebuilt(tree, doubled)
    for value in block.parameters():  # a gate of zero would hide what it gates
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            value.data += 0.2 * torch.randn(value.shape, generator=generator).to(value)
    call: Callable[..., Any] = block
    if spec.view is not None:
        tree = turned(tree, spec.view.inputs, turns(spec.view)[0])
        call = turned_block(block, spec.view)
    stream: Tensor = at(tree, spec.stream.path)
    orders = [torch.randperm(spec.num_tokens, generator=generator) for _ in stream]
    if any(not role.batched for role in spec.aligned):
        orders = [orders[0]] * len(orders)
    order = torch.stack(orders)
    expected = call(*tree[0], **tree[1])
    found = batch_at_once(call, tree, spec, order)[0]
    errors = []

    def compare(path: Any, leaf: Any) -> None:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return
        if tuple(path) in unread:
            return
        other, change = at(found, path), leaf
        if tuple(path) == tuple(spec.output):
            change = leaf if spec.bypass == "zeros" else leaf - stream
            leaf = torch.stack(
                [
                    picked(s, 0, o, spec.stream, spec.num_tokens)
                    for s, o in zip(leaf, order, strict=True)
                ]
            )
        errors.append(float((other - leaf).abs().max() / change.abs().max().clamp_min(1e-30)))

    rebuilt(expected, compare)
    return max(errors)


def doubled(_: Any, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_complex():
        return leaf.to(torch.complex128)
    return leaf.double() if leaf.is_floating_point() else leaf


def relative(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Norm of the difference over the norm of what was expected, all tensors as one vector."""
    shapes = [[tuple(t.shape) for t in side] for side in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs of shapes {shapes[0]}, expected {shapes[1]}")
    got, want = (
        torch.cat([torch.as_tensor(t).double().flatten() for t in s])
        for s in (found, expected)
    )
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def equal(found: Any, expected: Any) -> bool:
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def other_inputs(inputs: dict[str, Any], seed: int = 77) -> dict[str, Any]:
    """Inputs of another seed: float data drawn anew, per-sample scalars (timesteps) exchanged.

    Tensors of whole numbers, such as masks and position ids, stay.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [(t.ndim, len(t)) for t in tensors(inputs) if t.ndim]
    batch = max(sizes)[1]

    def draw(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            return leaf
        if leaf.ndim == 1 and len(leaf) == batch:
            return leaf.flip(0)
        if leaf.ndim < 2 or not leaf.is_floating_point() or bool((leaf == leaf.round()).all()):
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return leaf.mean() + leaf.std() * noise

    return rebuilt(inputs, draw)
