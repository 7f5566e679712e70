"""Which blocks may be routed, found by experiment and never by class name (design section 3).

1. *Candidates* (``candidates.py``): members of a ModuleList, ModuleDict or Sequential that hold submodules of their own
   and run once per forward; where there is none, attributes like ``block_0``, ``block_1``.
2. *Which tokens are image tokens* (``streams.py``, ``outside.py``): run the model with every candidate replaced by
   the identity, change the image input, and see which positions of each block's stream move.
3. *Roles* (``examiner.py``, ``trial.py``): the smallest set of token-aligned arguments with which
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
from collections.abc import Mapping, Set
from typing import Any, Literal

import torch
from torch import nn

from diffcr_compile.blocks import BlockSpec, Path, Refusal, show_path
from diffcr_compile.candidates import block_candidates, inner_candidates, shapes
from diffcr_compile.examiner import Examiner
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.parts import PartFindings, part_candidates
from diffcr_compile.program import identifier
from diffcr_compile.recorded import IllegalError, two_samples
from diffcr_compile.residual import Pairs
from diffcr_compile.streams import moved_positions, sample_input
from diffcr_compile.views import show_block, with_turned_blocks, with_views

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


def describe(spec: BlockSpec) -> str:
    """One line about a block's roles, for people."""
    extra = ", ".join(show_path(leaf.path) for leaf in spec.aligned) or "none"
    return (
        f"{spec.name}: {spec.num_tokens} tokens x {spec.width} in {show_path(spec.stream.path)}, "
        f"token-aligned: {extra}, permutation error {spec.error:.0e}"
    )
