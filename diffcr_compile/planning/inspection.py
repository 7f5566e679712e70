"""What ``inspect`` says about a model: blocks and their roles, costs, limits, what to do next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffcr_compile.blocks import BlockSpec, leaves, show_path
from diffcr_compile.config import CompileConfig
from diffcr_compile.legality import Findings, describe
from diffcr_compile.macs import keep_levels, measure_costs
from diffcr_compile.planning.advice import advise, suggested_budget
from diffcr_compile.planning.dry_run import DryRun, dry_run
from diffcr_compile.planning.estimates import Estimates, ModelSizes, estimate
from diffcr_compile.planning.overhead import Overhead, routing_overhead
from diffcr_compile.planning.plan_text import plan_text
from diffcr_compile.planning.targets import Target
from diffcr_compile.recorded import Call
from diffcr_compile.schedule import CostTable
from diffcr_compile.shortcut import macs_per_token

# Where the target's own figure is not known. Of the order of large GPUs in fp16; not measured.
ASSUMED_MACS_PER_BYTE = 100.0


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """A block that can be routed.

    Attributes:
        spec: where its tokens are, and the permutation error that was found.
        roles: argument -> image stream, token-aligned, text stream, global, or its value.
        same_as: the block of equal structure that was tried in its place; None if it was tried.
        macs: MACs per sample with all tokens; None if they could not be counted.
        share: of the model's MACs.
        overhead: None if the model could not be captured.
    """

    spec: BlockSpec
    roles: Mapping[str, str]
    same_as: str | None
    macs: float | None
    share: float | None
    overhead: Overhead | None

    def to_json(self) -> dict[str, Any]:
        spec, overhead = self.spec, self.overhead
        return {
            "name": spec.name,
            "tokens": spec.num_tokens,
            "width": spec.width,
            "stream": show_path(spec.stream.path),
            "first_token": spec.stream.start,
            "roles": dict(self.roles),
            "shares_index": spec.shares_index,
            "removable": spec.removable,
            "permutation_error": spec.error,
            "same_as": self.same_as,
            "macs": self.macs,
            "mac_share": self.share,
            "router_macs": overhead.router_macs if overhead else None,
            "moved_bytes": overhead.moved_bytes if overhead else None,
            "break_even_keep_ratio": overhead.break_even if overhead else None,
            "break_even_keep_ratio_macs_only": overhead.break_even_macs if overhead else None,
        }


@dataclasses.dataclass(frozen=True)
class RefusedBlock:
    """A candidate that stays dense: why, its share of the model's MACs, and who was tried for it."""

    name: str
    reason: str
    share: float | None
    same_as: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`diffcr_compile.inspect` found out about a model.

    Attributes:
        blocks: one line per block that can be routed, with the roles of its arguments.
        refused: block -> why it stays dense.
        costs: MACs per block and kept tokens; None if the model could not be captured.
        error: why the model cannot be captured; None if it can.
        note: what was done in another way than usual, and why; None if nothing.
        details: the blocks in full.
        refusals: the refused ones in full.
        parameters: number of weights.
        on_meta: the model has no weights; random ones were used.
        macs: MACs per sample of the dense model; None if they could not be counted.
        target: the device that the limits are of.
        macs_per_byte: with which bytes moved were weighed.
        macs_per_byte_from: where that figure is from.
        estimates: memory and disk; None if the model does not run.
        ops: ATen op -> how often it runs in one forward.
        recommendations: what to do, most important first.
    """

    blocks: tuple[str, ...]
    refused: Mapping[str, str]
    costs: CostTable | None
    error: str | None
    note: str | None
    details: tuple[BlockPlan, ...]
    refusals: tuple[RefusedBlock, ...]
    parameters: int
    on_meta: bool
    macs: float | None
    target: Target
    macs_per_byte: float
    macs_per_byte_from: str
    estimates: Estimates | None
    ops: Mapping[str, int]
    recommendations: tuple[str, ...]

    def __str__(self) -> str:
        return plan_text(self)

    @property
    def smallest_budget(self) -> float | None:
        """The smallest reachable share of the dense MACs; None if no block can be routed."""
        return self.costs.smallest_budget() if self.costs and self.details else None

    def next_command(self, source: str = "MODEL", inputs: str | None = None) -> str | None:
        """The command line that compiles the model; None if it cannot be compiled as it is.

        Args:
            source: MODEL as it was given on the command line.
            inputs: what was given as ``--inputs``.
        """
        budget = suggested_budget(self.smallest_budget)
        if self.error or budget is None or self.on_meta:
            return None
        given = f" --inputs {inputs}" if inputs else ""
        return f"diffcr compile {source}{given} -o out --budget {budget:.0%}"

    def to_json(self, source: str = "MODEL", inputs: str | None = None) -> dict[str, Any]:
        target = self.target
        return {
            "blocks": [block.to_json() for block in self.details],
            "refused": dict(self.refused),
            "refused_mac_share": {block.name: block.share for block in self.refusals},
            "error": self.error,
            "note": self.note,
            "parameters": self.parameters,
            "on_meta": self.on_meta,
            "macs_dense": self.costs.dense if self.costs else self.macs,
            "macs_outer": self.costs.outer if self.costs else None,
            "smallest_budget": self.smallest_budget,
            "macs_per_byte": self.macs_per_byte,
            "macs_per_byte_from": self.macs_per_byte_from,
            "target": {
                "name": target.name,
                "device": target.device,
                "runtime": target.runtime,
                "sm": list(target.sm),
                "max_opset": target.max_opset,
                "max_ir": target.max_ir,
                "max_topk": target.max_topk,
                "dtypes": list(target.dtypes),
                "remarks": list(target.remarks),
            },
            "troubles": target.troubles(self.ops),
            "ops": dict(sorted(self.ops.items())),
            "estimates_bytes": dataclasses.asdict(self.estimates) if self.estimates else None,
            "recommendations": list(self.recommendations),
            "next_command": self.next_command(source, inputs),
        }


def make_plan(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: CompileConfig,
    target: Target,
    macs_per_byte: float | None = None,
    problem: str | None = None,
) -> Plan:
    """Find out what can be routed and what it brings; what is wrong with the model is in the result.

    Args:
        model: any DiT, also one on the meta device; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        config: settings of the compilation that is planned.
        target: whose limits count.
        macs_per_byte: MACs that the device does in the time in which it moves a byte, if known.
        problem: why the model cannot be looked at, if it cannot.
    """
    if problem is None:
        seen = dry_run(model, args, kwargs, config.routing)
    else:
        seen = DryRun(Findings((), (), ()), error=problem)
    given = "given" if macs_per_byte is not None else f"measured for {target.name}"
    balance = macs_per_byte if macs_per_byte is not None else target.macs_per_byte
    if balance is None:
        balance, given = ASSUMED_MACS_PER_BYTE, "assumed, not measured; set --macs-per-byte"
    every, costs = _costs(seen, config)
    total = costs.dense if costs else seen.total_macs
    details = tuple(
        _block_plan(spec, seen, every, total, balance) for spec in seen.findings.blocks
    )
    tensors = [*model.parameters(), *model.buffers()]
    plan = Plan(
        blocks=tuple(describe(spec) for spec in seen.findings.blocks),
        refused={r.block: r.reason for r in seen.findings.refused},
        costs=costs,
        error=seen.error,
        note=seen.note,
        details=details,
        refusals=tuple(
            RefusedBlock(
                r.block, r.reason, _dense_share(seen, r.block), seen.same_as.get(r.block)
            )
            for r in seen.findings.refused
        ),
        parameters=sum(p.numel() for p in model.parameters()),
        on_meta=any(t.is_meta for t in tensors),
        macs=total,
        target=target,
        macs_per_byte=balance,
        macs_per_byte_from=given,
        estimates=_estimates(tensors, (args, kwargs), seen, config, target),
        ops=seen.ops,
        recommendations=(),
    )
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    devices = {t.device.type for t in tensors}
    return dataclasses.replace(plan, recommendations=advise(plan, dtypes, config, devices))


def _costs(seen: DryRun, config: CompileConfig) -> tuple[CostTable | None, CostTable | None]:
    """Costs at every multiple of tokens, and at those only that the settings allow."""
    if seen.program is None:
        return None, None
    routing = config.routing
    step, least, most = routing.multiple_of, routing.min_keep_ratio, routing.max_keep_ratio
    every = measure_costs(
        seen.program,
        step,
        least,
        1.0,
        skip_blocks=routing.skip_blocks,
        shortcut_rank=routing.shortcut_rank,
        mode=seen.mode,
    )
    allowed: dict[str, list[int]] = {}
    for spec in seen.program.blocks:
        skip = routing.skip_blocks and spec.removable
        levels = keep_levels(spec.num_tokens, step, least, most, skip=skip)
        allowed[spec.name] = [i for i, k in enumerate(every.levels[spec.name]) if k in levels]

    def pick(table: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
        return {name: tuple(table[name][i] for i in rows) for name, rows in allowed.items()}

    costs = CostTable(
        pick(every.levels),
        pick(every.per_level),
        pick(every.routing),
        pick(every.moved_bytes),
        every.outer,
    )
    return every, costs


def _dense_share(seen: DryRun, name: str) -> float | None:
    """Share of a refused block without those of its parts that can be routed."""
    if not seen.total_macs or name not in seen.macs:
        return None
    inside = [s.name for s in seen.findings.blocks if s.name.startswith(f"{name}.")]
    routed = sum(seen.macs.get(part, 0.0) for part in inside)
    return (seen.macs[name] - routed) / seen.total_macs


def _block_plan(
    spec: BlockSpec, seen: DryRun, costs: CostTable | None, total: float | None, balance: float
) -> BlockPlan:
    macs = costs.per_level[spec.name][-1] if costs else seen.macs.get(spec.name)
    call = seen.calls.get(spec.name)
    return BlockPlan(
        spec=spec,
        roles=argument_roles(spec, call) if call else {},
        same_as=seen.same_as.get(spec.name),
        macs=macs,
        share=macs / total if macs is not None and total else None,
        overhead=routing_overhead(spec, costs, call, balance) if costs else None,
    )


def argument_roles(spec: BlockSpec, call: Call) -> dict[str, str]:
    """Role of each argument of a block; plain values are shown as they are, None is left out."""
    aligned = {axis.path: axis for axis in spec.aligned}
    found = {}
    for path, leaf in leaves(call.tree):
        if leaf is None:
            continue
        if path == spec.stream.path:
            role = "image stream"
        elif path in aligned:
            role = f"token-aligned, axis {aligned[path].axis}"
        elif not isinstance(leaf, Tensor):
            role = repr(leaf)
        else:
            is_sequence = leaf.ndim == 3 and leaf.shape[1] > 1 and leaf.is_floating_point()
            role = "text stream" if is_sequence else "global"
        found[show_path(path)] = role
    return found


def _estimates(
    tensors: Sequence[Tensor], tree: Any, seen: DryRun, config: CompileConfig, target: Target
) -> Estimates | None:
    if not seen.forward_bytes:
        return None
    given = [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]
    batch = max(given, key=lambda t: t.ndim).shape[0]
    inputs = sum(t.numel() * t.element_size() for t in given)
    batched = sum(
        t.numel() * t.element_size() for t in given if t.ndim > 0 and t.shape[0] == batch
    )
    widths = [spec.width for spec in seen.findings.blocks]
    sizes = ModelSizes(
        weights=sum(t.numel() * t.element_size() for t in tensors),
        routing=sum(4 * _routing_weights(w, config.routing.shortcut_rank) for w in widths),
        width=sum(widths) // max(len(widths), 1),
        blocks=len(seen.macs),
        inputs=inputs,
        inputs_per_sample=batched // batch,
        outputs_per_sample=seen.output_bytes,
        forward=seen.forward_bytes,
        batch=batch,
    )
    return estimate(sizes, config, target.build_memory)


def _routing_weights(width: int, shortcut_rank: int) -> int:
    """Numbers in a router, and in a shortcut where there is one."""
    shortcut = macs_per_token(width, shortcut_rank) + width if shortcut_rank else 0
    return width + shortcut
