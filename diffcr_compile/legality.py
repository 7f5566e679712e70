"""Which blocks may be routed, found by experiment and never by class name (design section 3).

1. *Candidates*: members of a ModuleList, ModuleDict or Sequential that hold submodules of their own
   and run once per forward.
2. *Which tokens are image tokens*: run the model with every candidate replaced by the identity,
   change the image input, and see which positions of each block's stream move.
3. *Roles*: the smallest set of token-aligned arguments with which
   a. permuting the image tokens, each sample in its own way, permutes the output (in float64, on
      the real inputs), and
   b. the block runs on K < N tokens.
   An argument that fits by accident (width = N, text length = N) is not needed and is left alone.
4. Whatever cannot be shown legal is refused, with the reason and the number that was found.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import (
    BlockSpec,
    Path,
    Refusal,
    TokenAxis,
    get_leaf,
    leaves,
    map_leaves,
    show_path,
)
from diffcr_compile.cut import cut_arguments
from diffcr_compile.routing import gather_tokens

# In float64, legal blocks come out between 0 and 1e-15, 1e-7 where they compute in fp32 inside;
# illegal ones between 0.1 and 2 (measured over the transformer classes of diffusers 0.42).
MAX_PERMUTATION_ERROR = 1e-4
# How many combinations of argument axes are tried before a block is refused.
MAX_COMBINATIONS = 256
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclasses.dataclass(frozen=True)
class Call:
    """One recorded call of a block: ``tree`` is (args, kwargs)."""

    tree: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the experiments found.

    Attributes:
        blocks: blocks that may be routed, in running order.
        refused: candidates that may not, and why.
        sample: path of the noisy sample in (args, kwargs); () if no input looks like one.
    """

    blocks: tuple[BlockSpec, ...]
    refused: tuple[Refusal, ...]
    sample: Path


class _IllegalError(Exception):
    """Why a candidate may not be routed."""


def find_blocks(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Findings:
    """Find every block of `model` that may be routed, and the roles of its arguments.

    Args:
        model: a model in evaluation mode; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
    """
    candidates = dict(_candidates(model))
    with torch.no_grad():
        args, kwargs = _two_samples(model, args, kwargs)
        calls, output = _record(model, args, kwargs, candidates, identity=False)
        sample = _sample_input(args, kwargs, output)
        moved = _moved_positions(model, args, kwargs, candidates, sample)
        blocks: list[BlockSpec] = []
        refused: list[Refusal] = []
        for name in sorted(
            candidates, key=lambda n: list(calls).index(n) if n in calls else -1
        ):
            try:
                blocks.append(
                    _examine(
                        name, candidates[name], calls.get(name, []), moved.get(name), blocks
                    )
                )
            except _IllegalError as reason:
                refused.append(Refusal(name, str(reason)))
    return Findings(tuple(blocks), tuple(refused), sample)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost members of containers that have submodules with parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, _CONTAINERS) or any(name.startswith(f"{f}.") for f in found):
            continue
        for child_name, child in module.named_children():
            is_container = isinstance(child, _CONTAINERS)
            if is_container or not any(True for _ in child.children()):
                continue
            if any(True for _ in child.parameters()):
                full = f"{name}.{child_name}" if name else child_name
                found.append(full)
                yield full, child


def _record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    *,
    identity: bool,
) -> tuple[dict[str, list[Call]], Any]:
    """Run the model and record every call of a candidate, in running order."""
    calls: dict[str, list[Call]] = {}
    handles = []
    for name, module in candidates.items():

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
            tree = (tuple(args), dict(kwargs))
            calls.setdefault(name, []).append(Call(tree, output))
            return _identity_output(tree, output) if identity else None

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _two_samples(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with at least two samples: one alone hides which arguments go with the batch."""
    given = (tuple(args), dict(kwargs))
    tensors = [leaf for _, leaf in leaves(given) if isinstance(leaf, Tensor)]
    if not tensors or max(tensors, key=lambda t: t.ndim).shape[:1] != (1,):
        return given

    def double(_: Path, leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.shape[:1] == (1,)
        return torch.cat([leaf, leaf]) if is_batched else leaf

    doubled = map_leaves(given, double)
    try:
        model(*doubled[0], **doubled[1])
    except Exception:  # noqa: BLE001 - a model that takes one sample only
        return given
    return doubled[0], doubled[1]


def _identity_output(tree: Any, output: Any) -> Any:
    """The output with each tensor replaced by an input of the same shape, first come first served."""
    inputs = [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]

    def partner(_: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for index, given in enumerate(inputs):
            if given.shape == leaf.shape and given.dtype == leaf.dtype:
                return inputs.pop(index)
        return leaf

    return map_leaves(output, partner)


def _sample_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Path:
    """The input that is denoised: the float tensor that differs from the output in one axis at most."""
    result = next((t for t in _tensors(output)), None)
    inputs = [
        (path, leaf)
        for path, leaf in leaves((tuple(args), dict(kwargs)))
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim >= 3
    ]
    if result is not None:
        for path, leaf in inputs:
            if leaf.ndim == result.ndim:
                differing = sum(a != b for a, b in zip(leaf.shape, result.shape, strict=True))
                if differing <= 1:
                    return path
    return inputs[0][0] if inputs else ()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if hasattr(tree, "to_tuple"):  # the output dataclasses of diffusers and transformers
        tree = tree.to_tuple()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    for _, leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def _moved_positions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    sample: Path,
) -> dict[str, dict[Path, Tensor]]:
    """Per block and argument: which positions on axis 1 depend on the image, blocks being identity."""
    if not sample:
        return {}
    generator = torch.Generator().manual_seed(0)

    def perturb(path: Path, leaf: Any) -> Any:
        if path != sample:
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf + noise

    changed_args, changed_kwargs = map_leaves((tuple(args), dict(kwargs)), perturb)
    try:
        before, _ = _record(model, args, kwargs, candidates, identity=True)
        after, _ = _record(model, changed_args, changed_kwargs, candidates, identity=True)
    except Exception:  # noqa: BLE001 - a block whose output is no input cannot be an identity
        return {}
    moved: dict[str, dict[Path, Tensor]] = {}
    for name, calls in before.items():
        others = dict(leaves(after[name][0].tree))
        moved[name] = {
            path: (leaf != others[path]).movedim(1, 0).flatten(1).any(1)
            for path, leaf in leaves(calls[0].tree)
            if isinstance(leaf, Tensor) and leaf.ndim == 3 and leaf.is_floating_point()
        }
    return moved


def _examine(
    name: str,
    module: nn.Module,
    calls: Sequence[Call],
    moved: Mapping[Path, Tensor] | None,
    known: Sequence[BlockSpec],
) -> BlockSpec:
    """The roles of one candidate's arguments, or _IllegalError."""
    if len(calls) != 1:
        raise _IllegalError(
            f"it is called {len(calls)} times per forward; a routed block runs once"
        )
    call = calls[0]
    stream, output, span = _image_stream(call, moved)
    source: Tensor = get_leaf(call.tree, stream)
    start, num_tokens = span
    trial = _Trial(module, call, TokenAxis(stream, 1, start), output, num_tokens)
    wanted = _alike(known, call, stream) or ()
    aligned, error = trial.smallest_alignment(wanted)
    aligned = trial.per_sample(aligned)
    outputs = list(_tensors(call.output))
    return BlockSpec(
        name=name,
        stream=TokenAxis(stream, 1, start),
        output=output,
        aligned=aligned,
        num_tokens=num_tokens,
        width=source.shape[2],
        shares_index=any(not leaf.batched for leaf in aligned),
        removable=len(outputs) == 1 and num_tokens == source.shape[1],
        error=error,
    )


def _alike(
    known: Sequence[BlockSpec], call: Call, stream: Path
) -> tuple[TokenAxis, ...] | None:
    """Roles of an earlier block that has all these arguments: worth trying first."""
    present = {path for path, _ in leaves(call.tree)}
    for spec in reversed(known):
        if spec.stream.path == stream and all(leaf.path in present for leaf in spec.aligned):
            return spec.aligned
    return None


def _image_stream(
    call: Call, moved: Mapping[Path, Tensor] | None
) -> tuple[Path, Path, tuple[int, int]]:
    """(path in the call, path in the output, (start, num_tokens)) of the image stream."""
    if moved is None:
        raise _IllegalError(
            "it does not run when the other blocks are replaced by the identity"
        )
    floats = {
        path: leaf
        for path, leaf in leaves(call.tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    results = [(path, leaf) for path, leaf in leaves(call.output) if isinstance(leaf, Tensor)]
    if not results:
        raise _IllegalError(
            f"its output is {type(call.output).__name__}, with no tensor in a tuple or list"
        )
    streams = []
    taken: set[Path] = set()
    for output_path, result in results:
        for path, leaf in floats.items():
            if path not in taken and leaf.shape == result.shape and leaf.dtype == result.dtype:
                taken.add(path)
                if leaf.ndim == 3 and path in moved and bool(moved[path].any()):
                    streams.append((path, output_path, moved[path]))
                break
    if not taken:
        shapes = [tuple(leaf.shape) for _, leaf in results]
        raise _IllegalError(
            f"no input has the shape of its output {shapes}, so a token cannot bypass it"
        )
    if not streams:
        shapes = sorted({tuple(floats[path].shape) for path in taken})
        raise _IllegalError(
            f"no image token reaches it in a (batch, tokens, channels) stream; its streams are {shapes}"
        )
    if len(streams) > 1:
        raise _IllegalError(f"it carries {len(streams)} image streams; one is needed")
    path, output_path, positions = streams[0]
    where = positions.nonzero().flatten()
    start, count = int(where[0]), len(where)
    if int(where[-1]) - start + 1 != count:
        raise _IllegalError(
            f"its {count} image tokens are not contiguous ({start} to {int(where[-1])})"
        )
    if count < 2:
        raise _IllegalError(f"its stream has {count} image token")
    return path, output_path, (start, count)


class _Trial:
    """Runs a float64 copy of one block on its recorded inputs, permuted or cut."""

    def __init__(
        self, module: nn.Module, call: Call, stream: TokenAxis, output: Path, num_tokens: int
    ) -> None:
        self.stream, self.output, self.num_tokens = stream, output, num_tokens
        self.block = _double(module)
        generator = torch.Generator().manual_seed(1)
        self.tree = map_leaves(call.tree, lambda p, leaf: self._prepare(p, leaf, generator))
        source: Tensor = get_leaf(call.tree, stream.path)
        self.batch, self.length = source.shape[0], source.shape[1]
        try:
            self.reference = self._run(self.tree)
        except Exception as error:
            raise _IllegalError(f"it does not run in float64: {_short(error)}") from error
        self.generator = generator

    def _prepare(self, path: Path, leaf: Any, generator: torch.Generator) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_complex():
            return leaf.to(torch.complex128)
        if not leaf.is_floating_point():
            return leaf
        leaf = leaf.double()
        if (
            path == self.stream.path
        ):  # equal tokens (a constant image) would hide every difference
            return leaf + 0.5 * _noise(leaf, generator)
        if leaf.ndim == 0:
            return leaf
        # a gate that starts at zero may be computed outside the block (adaLN-single)
        return torch.where(leaf == 0, 0.2 * _noise(leaf, generator), leaf)

    def _run(self, tree: Any) -> Any:
        args, kwargs = tree
        return self.block(*args, **kwargs)

    def options(self) -> list[list[TokenAxis]]:
        """Per argument axis that could run along tokens: the ways in which it could."""
        lengths = {self.num_tokens: [0], self.length: [self.stream.start]}
        for path, leaf in leaves(self.tree):
            if isinstance(leaf, Tensor) and path != self.stream.path:
                for size in leaf.shape:  # text tokens may come first, or last
                    lengths.setdefault(self.num_tokens + size, [size, 0])
        found = []
        for path, leaf in leaves(self.tree):
            if not isinstance(leaf, Tensor) or path == self.stream.path:
                continue
            for axis, size in enumerate(leaf.shape):
                # axis 0 may have the size of the batch by accident, so both are tried
                batched = (
                    (True, False)
                    if axis > 0 and leaf.shape[0] in (1, self.batch)
                    else (False,)
                )
                starts = lengths.get(size, [])
                ways = [
                    TokenAxis(path, axis, s, b) for s, b in itertools.product(starts, batched)
                ]
                if ways:
                    found.append(ways)
        return found

    def smallest_alignment(
        self, first_try: tuple[TokenAxis, ...]
    ) -> tuple[tuple[TokenAxis, ...], float]:
        """The smallest set of token-aligned arguments that makes the block legal.

        Raises:
            _IllegalError: there is none.
        """
        options = self.options()
        every = itertools.islice(itertools.product(*options), MAX_COMBINATIONS)
        # An argument that has the size by accident must be left out, so smaller sets follow.
        fewer = (
            chosen
            for size in range(1, len(options))
            for subset in itertools.combinations(options, size)
            for chosen in itertools.product(*subset)
        )
        attempts = [first_try, (), *every, *itertools.islice(fewer, MAX_COMBINATIONS)]
        failures = []
        for aligned in attempts:
            failure = self.failure(aligned)
            if failure is None:
                return self._without_needless(aligned)
            failures.append(failure)
        raise _IllegalError(failures[-1])

    def _without_needless(
        self, aligned: tuple[TokenAxis, ...]
    ) -> tuple[tuple[TokenAxis, ...], float]:
        for leaf in aligned:
            fewer = tuple(other for other in aligned if other != leaf)
            if self.failure(fewer) is None:
                aligned = fewer
        return aligned, self.permutation_error(aligned)

    def failure(self, aligned: tuple[TokenAxis, ...]) -> str | None:
        """Why the block is not legal with these token-aligned arguments, or None."""
        try:
            error = self.permutation_error(aligned)
        except Exception as problem:  # noqa: BLE001 - the user's block may raise anything
            return f"it does not run with permuted tokens: {_short(problem)}"
        if not error <= MAX_PERMUTATION_ERROR:
            return (
                f"permuting its image tokens does not permute its output (relative error {error:.1e}, "
                f"allowed {MAX_PERMUTATION_ERROR:.0e}): it mixes tokens by their position"
            )
        kept = max(1, self.num_tokens // 2)
        index = self._orders(aligned)[:, :kept]
        try:
            result: Tensor = get_leaf(self._run(self._cut(aligned, index)), self.output)
        except Exception as problem:  # noqa: BLE001
            return f"it does not run on {kept} of {self.num_tokens} tokens: {_short(problem)}"
        expected = self.length - self.num_tokens + kept
        if result.shape[1] != expected:
            return f"given {expected} tokens it returns {result.shape[1]}"
        return None

    def permutation_error(self, aligned: tuple[TokenAxis, ...]) -> float:
        """Largest relative deviation from "permuted tokens in, permuted tokens out"."""
        order = self._orders(aligned)
        found = self._run(self._cut(aligned, order))
        expected = map_leaves(self.reference, lambda p, leaf: self._permuted(p, leaf, order))
        return max(
            (
                ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
                for a, b in zip(_tensors(found), _tensors(expected), strict=True)
                if a.is_floating_point()
            ),
            default=float("inf"),
        )

    def per_sample(self, aligned: tuple[TokenAxis, ...]) -> tuple[TokenAxis, ...]:
        """The same roles with an index of its own for each sample, if the block allows it.

        It does if it takes tables without a batch axis also with one.
        """
        own = tuple(dataclasses.replace(leaf, batched=True) for leaf in aligned)
        return aligned if self.batch == 1 or self.failure(own) is not None else own

    def _orders(self, aligned: tuple[TokenAxis, ...]) -> Tensor:
        """Random orders of the tokens, (B, N): one per sample, or one for all if tables need it.

        With one for all, a block that mixes samples (a temporal fold) would pass for legal, and
        so would a table whose leading axis has the size of the batch by accident.
        """
        shared = any(not leaf.batched for leaf in aligned)
        orders = [
            torch.randperm(self.num_tokens, generator=self.generator)
            for _ in range(1 if shared else self.batch)
        ]
        return torch.stack(orders).expand(self.batch, -1)

    def _permuted(self, path: Path, leaf: Any, order: Tensor) -> Any:
        if path != self.output:
            return leaf
        return gather_tokens(leaf, order, 1, self.stream.start, self.num_tokens, batched=True)

    def _cut(self, aligned: tuple[TokenAxis, ...], index: Tensor) -> Any:
        return cut_arguments(self.tree, (self.stream, *aligned), index, self.num_tokens)


def _double(module: nn.Module) -> nn.Module:
    """A float64 copy without zero or constant parameters: a zero gate would hide the block."""
    block = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1:
            hides = (parameter == 0) | (parameter == parameter.flatten()[0]).all()
            parameter.data += hides * 0.2 * _noise(parameter, generator)
    return block


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def describe(spec: BlockSpec) -> str:
    """One line about a block's roles, for people."""
    extra = ", ".join(show_path(leaf.path) for leaf in spec.aligned) or "none"
    return (
        f"{spec.name}: {spec.num_tokens} tokens x {spec.width} in {show_path(spec.stream.path)}, "
        f"token-aligned: {extra}, permutation error {spec.error:.0e}"
    )
