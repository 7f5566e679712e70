"""Which blocks may be routed, found by experiment and never by class name (design section 3).

1. *Candidates* (``candidates.py``): members of a ModuleList, ModuleDict or Sequential that hold submodules of their own
   and run once per forward; where there is none, attributes like ``block_0``, ``block_1``.
2. *Which tokens are image tokens* (``streams.py``): run the model with every candidate replaced by
   the identity, change the image input, and see which positions of each block's stream move.
3. *Roles* (``trial.py``): the smallest set of token-aligned arguments with which
   a. permuting the image tokens, each sample in its own way, permutes the output (in float64, on
      the real inputs), and
   b. the block runs on K < N tokens.
   An argument that fits by accident (width = N, text length = N) is not needed and is left alone.
4. *Nested containers*: where a candidate holds candidates itself, those inside are tried as well.
5. *Parts* (``parts.py``): token-wise parts of a refused block, such as its feed-forward.
6. Whatever cannot be shown legal is refused, with the reason and the number that was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import (
    BlockSpec,
    Path,
    Refusal,
    StreamView,
    TokenAxis,
    get_leaf,
    leaves,
    show_path,
)
from diffcr_compile.candidates import block_candidates, inner_candidates, shapes
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.parts import PartFindings, find_parts, part_candidates
from diffcr_compile.program import identifier
from diffcr_compile.recorded import (
    Call,
    IllegalError,
    check_static,
    output_tensors,
    two_samples,
)
from diffcr_compile.residual import Pairs, is_float, residual_pairs
from diffcr_compile.streams import (
    Moved,
    Outside,
    image_stream,
    moved_positions,
    record_calls,
    sample_input,
)
from diffcr_compile.trial import Trial
from diffcr_compile.views import guess_view, show_block, with_turned_blocks, with_views

# A module with this share of its parameters in a row of equal legal blocks is not one block itself.
MOSTLY = 0.9
# What is routed: whole blocks; token-wise parts of them; or parts where the whole block is refused.
Granularity = Literal["auto", "block", "mlp"]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the experiments found.

    Attributes:
        blocks: blocks that may be routed, in running order.
        refused: candidates that may not, and why.
        sample: path of the noisy sample in (args, kwargs); () if no input looks like one.
        order: names of both as they run; one that did not run comes last.
    """

    blocks: tuple[BlockSpec, ...]
    refused: tuple[Refusal, ...]
    sample: Path
    order: tuple[str, ...] = ()


class Examiner:
    """How candidates are looked at. A dry run has a quicker way (``planning/dry_run.py``).

    One examiner is for one model and one set of example inputs.
    """

    _recorded: tuple[Any, tuple[Mapping[str, list[Call]], Any]] | None = None

    def prepared(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """The model that is run, and its candidates."""
        return model, candidates

    def views(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> dict[str, StreamView]:
        """How candidates are shown whose streams are not batch first, see ``views.py``."""
        return guess_views(args, kwargs, *self.recorded(model, args, kwargs, candidates))

    def recorded(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> tuple[Mapping[str, list[Call]], Any]:
        """The calls of the candidates and the output of one forward, which is asked for twice where nothing is turned."""
        key = (model, dict(candidates))
        if self._recorded is None or self._recorded[0] != key:
            self._recorded = (
                key,
                record_calls(model, args, kwargs, candidates, identity=False),
            )
        return self._recorded[1]

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

    def parts(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        wanted: Mapping[str, nn.Module],
        every: Mapping[str, nn.Module],
        sample: Path,
    ) -> dict[str, PartFindings]:
        """See ``parts.find_parts``.

        Args:
            model: the whole model.
            args: its positional inputs.
            kwargs: its keyword inputs.
            wanted: blocks whose parts are wanted.
            every: all blocks of the model.
            sample: path of the noisy sample.
        """
        calls, _ = record_calls(model, args, kwargs, wanted, identity=False)
        every = {name: module for name, module in every.items() if name not in wanted}
        pairs = {n: self.pairs(n, wanted[n], recorded[0]) for n, recorded in calls.items()}
        outside = Outside(
            model, (tuple(args), dict(kwargs)), {**every, **wanted}, sample, pairs
        )
        return find_parts(wanted, calls, outside)


def find_blocks(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    examiner: Examiner | None = None,
    granularity: Granularity = "auto",
) -> Findings:
    """Find every block of `model` that may be routed, and the roles of its arguments.

    Args:
        model: a model in evaluation mode; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        examiner: how candidates are looked at; inputs must then have two samples if they can.
        granularity: whole blocks, or token-wise parts of them, or the second where the first is refused.
    """
    with kept_caches(model), torch.no_grad():
        if examiner is None:
            args, kwargs = two_samples(model, args, kwargs)
        examiner = examiner or Examiner()
        candidates = dict(block_candidates(model))
        views = examiner.views(model, args, kwargs, candidates)
        model = with_turned_blocks(model, views) if views else model
        candidates |= {
            name: show_block(candidates[name], view) for name, view in views.items()
        }
        found = _find(model, args, kwargs, candidates, examiner)
        if granularity != "block" and found.sample:
            found = _with_parts(found, model, args, kwargs, examiner, granularity, set(views))
        found = _with_distinct_names(found)
        return dataclasses.replace(found, blocks=with_views(found.blocks, views))


def _with_distinct_names(found: Findings) -> Findings:
    """Refuse a block that would be called like an earlier one inside the graph: ``a.b`` and ``a_b``.

    Routers, inputs and files are found by that name.
    """
    first: dict[str, BlockSpec] = {}
    refused = list(found.refused)
    for spec in found.blocks:
        other = first.setdefault(identifier(spec.name), spec)
        if other is not spec:
            reason = (
                f"its name and that of {other.name} differ by dots and underscores only, and both are "
                f"{identifier(spec.name)} in a graph; rename one of the two modules"
            )
            refused.append(Refusal(spec.name, reason))
    return dataclasses.replace(found, blocks=tuple(first.values()), refused=tuple(refused))


def guess_views(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    calls: Mapping[str, Sequence[Call]],
    output: Any,
) -> dict[str, StreamView]:
    """The layouts of candidates that are called once and whose streams are not batch first.

    Args:
        args: positional inputs of the model.
        kwargs: its keyword inputs.
        calls: its calls of the candidates.
        output: its output.
    """
    sample = sample_input(args, kwargs, output)
    if not sample:
        return {}
    batch = int(get_leaf((tuple(args), dict(kwargs)), sample).shape[0])
    guesses = {
        n: guess_view(recorded[0], batch)
        for n, recorded in calls.items()
        if len(recorded) == 1
    }
    return {name: view for name, view in guesses.items() if view is not None}


def _with_parts(
    found: Findings,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    examiner: Examiner,
    granularity: Granularity,
    turned: Set[str] = frozenset(),
) -> Findings:
    """Token-wise parts beside the legal blocks (auto), or in the place of them (mlp)."""
    legal = {spec.name: spec for spec in found.blocks}
    refused = {refusal.block: refusal for refusal in found.refused}
    every = {name: model.get_submodule(name) for name in found.order}
    wanted = {
        name: module
        for name, module in every.items()
        if (granularity == "mlp" or name in refused)
        and name not in turned  # their parts are called in another layout
        and any(part_candidates(module))
    }
    if not wanted:
        return found
    parts = examiner.parts(model, args, kwargs, wanted, every, found.sample)
    blocks: list[BlockSpec] = []
    reasons: list[Refusal] = []
    for name in every:
        within = parts.get(name)
        if within is not None:
            blocks += within.parts
        if name in refused:
            reasons.append(Refusal(name, refused[name].reason + _about_parts(name, within)))
        elif name not in wanted:
            blocks.append(legal[name])
        elif within is None or not within.parts:
            reason = "it can be routed as a whole, but parts are asked for"
            reasons.append(Refusal(name, reason + _about_parts(name, within)))
    return Findings(tuple(blocks), tuple(reasons), found.sample, found.order)


def _about_parts(name: str, found: PartFindings | None) -> str:
    if found is None:
        return ""
    if found.parts:
        names = ", ".join(spec.name.removeprefix(f"{name}.") for spec in found.parts)
        return f"; of its parts these can be routed: {names}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in found.reasons.items())
    return f"; nor can a part of it ({reasons})" if reasons else ""


def _find(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    examiner: Examiner,
) -> Findings:
    """Try all candidates, and what is inside of them."""
    run, watched = examiner.prepared(model, args, kwargs, candidates)
    calls, output = examiner.recorded(run, args, kwargs, watched)
    sample = sample_input(args, kwargs, output)
    pairs: dict[str, Pairs] = {
        name: examiner.pairs(name, candidates[name], recorded[0])
        for name, recorded in calls.items()
    }
    moved = moved_positions(run, args, kwargs, watched, sample, pairs)
    blocks: list[BlockSpec] = []
    refused: list[Refusal] = []
    order = list(calls)
    order += [name for name in candidates if name not in calls]
    for name in order:
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
    found = Findings(tuple(blocks), tuple(refused), sample, tuple(order))
    inside = {name: dict(inner_candidates(candidates[name], name)) for name in calls}
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
        size = sum(sum(shape.numel() for _, shape in shapes(block)) for block in held)
        whole = sum(shape.numel() for _, shape in shapes(candidates[name]))
        is_row = len({shapes(block) for block in held}) == 1 and size >= MOSTLY * whole
        if name not in legal or is_row:
            opened.append(name)
    names = set(opened)

    order: list[str] = []
    found: dict[str, BlockSpec | Refusal] = {}
    for name in outer.order:
        part = nested if name in names else outer
        here = [n for n in part.order if n == name or _is_inside(n, {name})]
        order += here
        by_name: dict[str, BlockSpec | Refusal] = {spec.name: spec for spec in part.blocks}
        by_name |= {refusal.block: refusal for refusal in part.refused}
        found |= {n: by_name[n] for n in here}
    return Findings(
        tuple(item for item in found.values() if isinstance(item, BlockSpec)),
        tuple(item for item in found.values() if isinstance(item, Refusal)),
        outer.sample,
        tuple(order),
    )


def _is_inside(name: str, parents: set[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


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
    if call.fault:
        raise IllegalError(call.fault)
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
        if isinstance(leaf, Tensor)
        and (path not in pairs or not is_float(leaf))
        and not moved.outside.is_read(name, path)
    )
    trial = Trial(module, call, axis, output, num_tokens, unread)
    wanted = _alike(known, call, stream) or ()
    aligned, error = trial.smallest_alignment(wanted)
    aligned = trial.per_sample(aligned)
    trial.check_counts(aligned)
    check_static(module, call)
    # In this order: what gets past is found out once for all blocks, a residual in each by itself.
    is_branch = name in moved.outside.bypassed and not trial.has_own_residual()
    if is_branch and not moved.outside.adds(name, output):
        raise IllegalError(
            "it has no residual of its own, and the model does more with its output than to add it to "
            "a stream, so it is not known what a token would get that bypasses it; move the residual "
            "into the block"
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
        bypass="zeros" if is_branch else "stream",
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


def describe(spec: BlockSpec) -> str:
    """One line about a block's roles, for people."""
    extra = ", ".join(show_path(leaf.path) for leaf in spec.aligned) or "none"
    return (
        f"{spec.name}: {spec.num_tokens} tokens x {spec.width} in {show_path(spec.stream.path)}, "
        f"token-aligned: {extra}, permutation error {spec.error:.0e}"
    )
