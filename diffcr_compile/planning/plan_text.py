"""A plan as text for a terminal: one line per group of equal blocks, then advice, then what to run."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffcr_compile.blocks import show_path
from diffcr_compile.planning.overhead import SHOWN_KEEP_RATIO

if TYPE_CHECKING:
    from diffcr_compile.planning.inspection import BlockPlan, Plan

# the last number in a name, with what stands before and behind it
_NUMBERED = re.compile(r"(.*\.)(\d+)((?:\.[A-Za-z_]\w*)*)")


def plan_text(
    plan: Plan, name: str = "", source: str = "MODEL", inputs: str | None = None
) -> str:
    """The whole plan.

    Args:
        plan: from ``inspect``.
        name: how the model is called.
        source: MODEL as it was given on the command line.
        inputs: what was given as ``--inputs``.
    """
    command = plan.next_command(source, inputs)
    parts = [
        _head(plan, name),
        _routed(plan),
        _refused(plan),
        _facts(plan),
        [*_section("advice", plan.recommendations)],
        [f"next:  {command}"] if command else [],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(plan: Plan, name: str) -> list[str]:
    weights = " on the meta device (random ones were used)" if plan.on_meta else ""
    macs = f", {_number(plan.macs)} MACs per sample" if plan.macs else ""
    lines = [f"{name or 'model'}: {_number(plan.parameters)} parameters{weights}{macs}"]
    if plan.error:
        lines.append(f"cannot be captured: {plan.error}")
    if plan.note:
        lines.append(f"note: {plan.note}")
    return lines


def _routed(plan: Plan) -> list[str]:
    groups = grouped(plan.details, _block_key)
    if not groups:
        return []
    rows = [
        (
            "can be routed",
            "count",
            "tokens x width",
            "MACs each",
            "share",
            "router",
            "moved",
            "break-even",
        )
    ]
    for blocks in groups:
        first = blocks[0]
        share = sum(block.share or 0.0 for block in blocks)
        over = first.overhead
        rows.append((
            span([block.spec.name for block in blocks]),
            str(len(blocks)),
            f"{first.spec.num_tokens} x {first.spec.width}",
            _number(first.macs) if first.macs is not None else "?",
            f"{share:.1%}",
            f"{over.router_macs / first.macs:.3%}" if over and first.macs else "?",
            f"{over.moved_bytes / 1e6:.2f} MB" if over else "?",
            _ratio(over.break_even) if over else "?",
        ))  # fmt: skip
    lines = _table(rows)
    for blocks in groups:
        lines += _why(blocks)
    if plan.costs:
        lines.append(
            f"moved: bytes at keep ratio {SHOWN_KEEP_RATIO}; break-even: keep ratio below which routing pays, at "
            f"{plan.macs_per_byte:g} MACs per byte ({plan.macs_per_byte_from})"
        )
        outside = plan.costs.outer / plan.costs.dense
        lines.append(
            f"{outside:.1%} of the MACs are outside these blocks; smallest reachable budget "
            f"{plan.costs.smallest_budget():.1%}"
        )
    return lines


def _why(blocks: Sequence[BlockPlan]) -> list[str]:
    spec = blocks[0].spec
    roles = "; ".join(
        f"{role}: {', '.join(_argument(path) for path in paths)}"
        for role, paths in _by_role(blocks[0].roles).items()
    )
    tried = [block.spec.name for block in blocks if block.same_as is None]
    others = len(blocks) - len(tried)
    same = (
        f"; {others} others have the same structure as {tried[0]}" if others and tried else ""
    )
    alone = blocks[0].same_as
    if not tried and alone:
        same = f"; same structure as {alone}"
    errors = max(block.spec.error for block in blocks)
    lines = [
        f"  {span([block.spec.name for block in blocks])}: {roles or show_path(spec.stream.path)}",
        f"    tokens permuted, output permuted (error {errors:.0e}), runs on half of them{same}",
    ]
    if spec.shares_index:
        lines.append("    one selection for the whole batch: its tables have no batch axis")
    return lines


def _by_role(roles: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, role in roles.items():
        found.setdefault(role, []).append(path)
    return found


def _argument(path: str) -> str:
    """``kwargs['temb']`` -> ``temb``; positional ones stay ``args[0]``."""
    return re.sub(r"^kwargs\['(\w+)'\]", r"\1", path)


def _refused(plan: Plan) -> list[str]:
    groups = grouped(plan.refusals, lambda block: block.reason)
    lines = []
    for blocks in groups:
        share = sum(block.share or 0.0 for block in blocks)
        names = span([block.name for block in blocks])
        tried = [b for b in blocks if b.same_as is None]
        same = f" (tried: {tried[0].name})" if len(tried) < len(blocks) and tried else ""
        lines.append(
            f"  {names} ({len(blocks)}, {share:.1%} of the MACs): {blocks[0].reason}{same}"
        )
    return ["refused, stay dense", *lines] if lines else []


def _facts(plan: Plan) -> list[str]:
    target = plan.target
    sm = f", SM{'/'.join(map(str, target.sm))}" if target.sm else ""
    lines = [f"target {target.name}: {target.device}, {target.runtime}{sm}; {target.limits()}"]
    lines += [f"  {remark}" for remark in target.remarks]
    sizes = plan.estimates
    if sizes:
        lines += [
            (
                f"memory: weights {_bytes(sizes.weights)}, calibration up to {_bytes(sizes.calibrate)} "
                f"({_bytes(sizes.calibrate_routers)} for routers only)"
            ),
            (
                f"disk: artifact {_bytes(sizes.artifact)}, teacher rollouts {_bytes(sizes.rollouts)}, "
                f"folder {_bytes(sizes.folder)}, at most {_bytes(sizes.disk_peak)} on the way"
            ),
        ]
    if sizes and sizes.engine_build is not None and sizes.engines is not None:
        lines.append(
            f"device: an engine build takes about {_bytes(sizes.engine_build)}, one engine per bucket "
            f"{_bytes(sizes.engines)} of weights"
        )
    return lines


def _section(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"  {item}" for item in items]
    return [title, *lines] if lines else []


def grouped(blocks: Iterable[Any], key: Any) -> list[list[Any]]:
    """Blocks with equal keys together, groups in the order of their first block."""
    groups: dict[Hashable, list[Any]] = {}
    for block in blocks:
        groups.setdefault(key(block), []).append(block)
    return list(groups.values())


def _block_key(block: BlockPlan) -> Hashable:
    spec = block.spec
    facts = (
        spec.num_tokens,
        spec.width,
        spec.stream,
        spec.aligned,
        spec.output,
        spec.shares_index,
    )
    over = block.overhead
    return (facts, tuple(block.roles.items()), block.macs, over)


def span(names: Sequence[str]) -> str:
    """``blocks.0-27`` or ``blocks.0-27.ff`` for consecutive numbers, else the names."""
    split = [_NUMBERED.fullmatch(name) for name in names]
    found = [(match[1], match[3], int(match[2])) for match in split if match]
    around = {(prefix, suffix) for prefix, suffix, _ in found}
    if len(found) != len(names) or len(around) != 1 or len(names) == 1:
        return ", ".join(names)
    prefix, suffix, _ = found[0]
    numbers = sorted(number for _, _, number in found)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    ranges = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return prefix + ",".join(ranges) + suffix


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _ratio(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"


def _number(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 / 10 else f"{value / 1e6:.1f} MB"
