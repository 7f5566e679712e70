"""Which blocks may be routed, found by experiment and never by class name (design section 3).

1. *Candidates*: members of a ModuleList, ModuleDict or Sequential that hold submodules of their own
   and run once per forward; where there is none, attributes like ``block_0``, ``block_1``.
2. *Which tokens are image tokens* (``streams.py``): run the model with every candidate replaced by
   the identity, change the image input, and see which positions of each block's stream move.
3. *Roles* (``trial.py``): the smallest set of token-aligned arguments with which
   a. permuting the image tokens, each sample in its own way, permutes the output (in float64, on
      the real inputs), and
   b. the block runs on K < N tokens.
   An argument that fits by accident (width = N, text length = N) is not needed and is left alone.
4. *Nested containers*: where a candidate holds candidates itself, those inside are tried as well.
5. Whatever cannot be shown legal is refused, with the reason and the number that was found.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

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
from diffcr_compile.data_dependent import DATA_DEPENDENT, needs_values
from diffcr_compile.recorded import Call, IllegalError, output_tensors, two_samples
from diffcr_compile.residual import Pairs, identity_output, is_float, residual_pairs
from diffcr_compile.streams import (
    Moved,
    image_stream,
    moved_positions,
    record_calls,
    sample_input,
)
from diffcr_compile.trial import Trial

__all__ = [
    "Call",
    "Examiner",
    "Findings",
    "IllegalError",
    "block_candidates",
    "describe",
    "examine",
    "find_blocks",
    "identity_output",
    "image_stream",
    "moved_positions",
    "output_tensors",
    "record_calls",
    "sample_input",
    "two_samples",
]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NUMBERED = re.compile(r"(.*?)_?\d+$")
# A module with this share of its parameters in a row of equal legal blocks is not one block itself.
MOSTLY = 0.9


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


class Examiner:
    """How candidates are looked at. A dry run has a quicker way (``dry_run.py``)."""

    def prepared(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """The model that is run, and its candidates."""
        return model, candidates

    def pairs(self, name: str, module: nn.Module, call: Call) -> Pairs:
        """See ``residual.residual_pairs``."""
        return residual_pairs(module, call)

    def examine(
        self,
        name: str,
        module: nn.Module,
        calls: Sequence[Call],
        moved: Moved | None,
        known: Sequence[BlockSpec],
    ) -> BlockSpec:
        """See :func:`examine`."""
        return examine(name, module, calls, moved, known)


def find_blocks(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    examiner: Examiner | None = None,
) -> Findings:
    """Find every block of `model` that may be routed, and the roles of its arguments.

    Args:
        model: a model in evaluation mode; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        examiner: how candidates are looked at; inputs must then have two samples if they can.
    """
    with torch.no_grad():
        if examiner is None:
            args, kwargs = two_samples(model, args, kwargs)
        candidates = dict(block_candidates(model))
        return _find(model, args, kwargs, candidates, examiner or Examiner())


def _find(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    examiner: Examiner,
) -> Findings:
    """Try all candidates, and what is inside of them."""
    run, watched = examiner.prepared(model, args, kwargs, candidates)
    calls, output = record_calls(run, args, kwargs, watched, identity=False)
    sample = sample_input(args, kwargs, output)
    pairs: dict[str, Pairs] = {
        name: examiner.pairs(name, candidates[name], recorded[0])
        for name, recorded in calls.items()
    }
    moved = moved_positions(run, args, kwargs, watched, sample, pairs)
    blocks: list[BlockSpec] = []
    refused: list[Refusal] = []
    order = list(calls)
    for name in sorted(candidates, key=lambda n: order.index(n) if n in order else -1):
        recorded = calls.get(name, [])
        try:
            if not sample:
                raise IllegalError(
                    "none of the model's inputs has the shape of its output, so it is not known "
                    "which one is the image"
                )
            module, where = candidates[name], moved.get(name)
            blocks.append(examiner.examine(name, module, recorded, where, blocks))
        except IllegalError as reason:
            refused.append(Refusal(name, str(reason)))
    found = Findings(tuple(blocks), tuple(refused), sample)
    inside = {name: dict(_inner_candidates(candidates[name], name)) for name in calls}
    if not any(inside.values()):
        return found
    nested = {name: module for name, module in candidates.items() if not inside.get(name)}
    for inner in inside.values():
        nested.update(inner)
    return _with_inner(found, _find(model, args, kwargs, nested, examiner), inside, candidates)


def _with_inner(
    outer: Findings,
    nested: Findings,
    inside: Mapping[str, Mapping[str, nn.Module]],
    candidates: Mapping[str, nn.Module],
) -> Findings:
    """The legal blocks in a candidate take its place if it is refused, or just a row of equal ones."""
    legal = {spec.name for spec in outer.blocks}
    opened = []
    for name, inner in inside.items():
        routable = [s.name for s in nested.blocks if _is_inside(s.name, {name})]
        if not inner or not routable:
            continue
        modules = dict(candidates[name].named_modules(prefix=name))
        held = [modules[block] for block in routable]
        size = sum(sum(shape.numel() for _, shape in _shapes(block)) for block in held)
        whole = sum(shape.numel() for _, shape in _shapes(candidates[name]))
        is_row = len({_shapes(block) for block in held}) == 1 and size >= MOSTLY * whole
        if name not in legal or is_row:
            opened.append(name)
    names = set(opened)

    def merged(one: Sequence[Any], two: Sequence[Any], key: str) -> list[Any]:
        kept = [item for item in one if getattr(item, key) not in names]
        return kept + [item for item in two if _is_inside(getattr(item, key), names)]

    order = {name: rank for rank, name in enumerate(inside)}  # as they run
    blocks: list[BlockSpec] = merged(outer.blocks, nested.blocks, "name")
    # sorted() leaves the running order inside of a candidate as it is
    blocks.sort(
        key=lambda spec: next(order[n] for n in order if _is_inside(spec.name, {n}, own=True))
    )
    refused = merged(outer.refused, nested.refused, "block")
    return Findings(tuple(blocks), tuple(refused), outer.sample)


def _is_inside(name: str, parents: set[str], *, own: bool = False) -> bool:
    return any(name.startswith(f"{parent}.") or (own and name == parent) for parent in parents)


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())


def block_candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost members of containers that have submodules with parameters.

    In a model without any: attributes with a number in their name and equal weights.
    """
    found = list(_members(model)) or list(_siblings(model))
    yield from found


def _members(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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


def _siblings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost children of one module that differ in the number in their name only."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{f}.") for f in found):
            continue
        groups: dict[Any, list[tuple[str, nn.Module]]] = {}
        for child_name, child in module.named_children():
            match = _NUMBERED.match(child_name)
            if match and not child_name.isdigit() and _is_block(child):
                full = f"{name}.{child_name}" if name else child_name
                groups.setdefault((match[1], type(child), _shapes(child)), []).append(
                    (full, child)
                )
        for group in groups.values():
            if len(group) > 1:
                found += [full for full, _ in group]
                yield from group


def _inner_candidates(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for inner, child in _members(module):
        if _is_block(child):
            yield f"{name}.{inner}", child


def _is_block(module: nn.Module) -> bool:
    """More than one layer."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules()) > 1


def examine(
    name: str,
    module: nn.Module,
    calls: Sequence[Call],
    moved: Moved | None,
    known: Sequence[BlockSpec],
) -> BlockSpec:
    """The roles of one candidate's arguments, or IllegalError."""
    if len(calls) != 1:
        raise IllegalError(
            f"it is called {len(calls)} times per forward; a routed block runs once"
        )
    call = calls[0]
    pairs = moved.pairs if moved is not None else None
    if pairs is None and moved is not None:
        pairs = residual_pairs(module, call)
    stream, output, span = image_stream(call, moved, pairs)
    assert moved is not None
    assert pairs is not None
    source: Tensor = get_leaf(call.tree, stream)
    start, num_tokens = span
    axis = TokenAxis(stream, 1, start)
    unread = frozenset(
        path
        for path, leaf in leaves(call.output)
        if is_float(leaf) and path not in pairs and not moved.outside.is_read(name, path)
    )
    trial = Trial(module, call, axis, output, num_tokens, unread)
    wanted = _alike(known, call, stream) or ()
    aligned, error = trial.smallest_alignment(wanted)
    aligned = trial.per_sample(aligned)
    _check_static(module, call)
    if not trial.has_own_residual() and name in moved.outside.bypassed:
        raise IllegalError(
            "it has no residual of its own: the model adds its output to something else, and a token "
            "that bypasses it would be added there; move the addition into the block"
        )
    outputs = list(output_tensors(call.output))
    return BlockSpec(
        name=name,
        stream=axis,
        output=output,
        aligned=aligned,
        num_tokens=num_tokens,
        width=source.shape[2],
        shares_index=any(not leaf.batched for leaf in aligned),
        removable=len(outputs) == 1 and num_tokens == source.shape[1],
        error=error,
    )


def _check_static(module: nn.Module, call: Call) -> None:
    """Run on fake tensors, which is what a graph of fixed shapes can do."""
    if any(isinstance(leaf, FakeTensor) for _, leaf in leaves(call.tree)):
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = map_leaves(
        call.tree, lambda _, leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf
    )
    try:
        with mode, torch.no_grad():
            module(*args, **kwargs)
    except DATA_DEPENDENT as error:
        raise IllegalError(needs_values(error)) from error
    except Exception:  # noqa: BLE001 - what else is wrong, the experiments say
        return


def _alike(
    known: Sequence[BlockSpec], call: Call, stream: Path
) -> tuple[TokenAxis, ...] | None:
    """Roles of an earlier block that has all these arguments: worth trying first."""
    present = {path for path, _ in leaves(call.tree)}
    for spec in reversed(known):
        if spec.stream.path == stream and all(leaf.path in present for leaf in spec.aligned):
            return spec.aligned
    return None


def describe(spec: BlockSpec) -> str:
    """One line about a block's roles, for people."""
    extra = ", ".join(show_path(leaf.path) for leaf in spec.aligned) or "none"
    return (
        f"{spec.name}: {spec.num_tokens} tokens x {spec.width} in {show_path(spec.stream.path)}, "
        f"token-aligned: {extra}, permutation error {spec.error:.0e}"
    )
