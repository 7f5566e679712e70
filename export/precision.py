"""Which blocks may compute in half precision, found on states that the model meets, and the graphs made of it.

With int8, the linear layers of tokens of float16 graphs are then put into int8, with the ranges of the same states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from onnx import ModelProto
from torch import Tensor
from torch.export import ExportedProgram

from diffcr_compile.errors import AccuracyError
from diffcr_compile.export.half import HalfPrecision, compute_in_half
from diffcr_compile.export.half_run import LARGEST_HALF, HalfRun, Range, Ranges, WideRun
from diffcr_compile.export.int8 import compute_in_int8, dequantize_to_half
from diffcr_compile.export.int8_ranges import Int8Ranges
from diffcr_compile.export.onnx_model import (
    WRAPPED,
    exported_program,
    graph_from_exported,
)
from diffcr_compile.export.parity import Parity, compare
from diffcr_compile.program import Program

States = Sequence[Sequence[Mapping[str, Tensor]]]
Precision = Literal["fp16", "bf16", "int8"]
# A block whose products come nearer than this to the end of float16 stays in float32: states that were
# not looked at may be larger.
HEADROOM = 4.0
# Relative L2 from float32 that is allowed.
TOLERANCES: dict[Precision, float] = {
    # Products of hundreds to thousands of terms, rounded to 11 bits, through tens of blocks end near 1e-3; tokens
    # that swap at the cut of a TopK add some.
    "fp16": 5e-3,
    # 8 bits in the place of 11: eight times as much.
    "bf16": 4e-2,
    # Activations on 255 levels per tensor cost 1e-2 to 5e-2 in the worst states of the reference model; graphs that
    # are wrong are off by 0.1 and more.
    "int8": 8e-2,
}
NAMES: dict[Precision, str] = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
OUTSIDE = "outside of the blocks"


def step_of(precision: Precision) -> str:
    """What :func:`half_graphs` compares, for the reader."""
    return f"FROZEN -> {NAMES[precision]}, products rounded as in hardware"


@dataclasses.dataclass(frozen=True)
class HalfSettings:
    """The type of products, and how it is checked.

    Attributes:
        precision: ``fp16``, ``bf16``, or ``int8``: fp16 with the linear layers of tokens in int8.
        tolerance: largest relative L2 difference from float32, on every state; by default that of
            ``TOLERANCES``.
        states: inputs of each bucket, best those of a whole sampling run; the golden ones are always
            looked at too.
        islands: blocks that stay in float32, "" for what lies outside of blocks; None for those that the
            states show to need it. bfloat16 has the range of float32: no block needs it.
    """

    precision: Precision = "fp16"
    tolerance: float | None = None
    states: States | None = None
    islands: tuple[str, ...] | None = None

    @property
    def half(self) -> HalfPrecision:
        """The half type in the graphs."""
        return "bf16" if self.precision == "bf16" else "fp16"

    @property
    def allowed(self) -> float:
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance


@dataclasses.dataclass(frozen=True)
class HalfGraphs:
    """FROZEN programs in half precision, checked on states.

    Attributes:
        settings: what was asked for.
        islands: blocks that stay in float32, "" for what lies outside of blocks.
        ranges: block -> the largest value that its products read or write, over all states.
        states: how many inputs were looked at.
        swapped: share of the kept tokens that half precision would choose otherwise.
        rows: the worst state of each timestep bucket, with the tokens that float32 chose.
        made: bucket -> the program in half precision.
        inputs: names of its inputs, in order.
        int8: name of a weight -> the largest magnitude that its layers read, of layers in int8; None
            without int8.
    """

    settings: HalfSettings
    islands: tuple[str, ...]
    ranges: Mapping[str, Range]
    states: int
    swapped: float
    rows: tuple[Parity, ...]
    made: Mapping[int, ExportedProgram]
    inputs: tuple[str, ...]
    int8: Mapping[str, float] | None = None

    def export(self, program: Program) -> tuple[ModelProto, dict[str, str]]:
        """The ONNX graph and the node map of a FROZEN or an OPEN program."""
        exported = None if program.bucket is None else self.made[program.bucket]
        if exported is None:
            wide = exported_program(program)
            exported = _made(wide, program, self.islands, self.settings.half, self.int8)
        bfloat16 = self.settings.half == "bf16"
        model, nodes = graph_from_exported(exported, program, bfloat16=bfloat16)
        if self.int8 is not None:
            for cast in dequantize_to_half(model):
                del nodes[cast]
        return model, nodes

    def wide_outputs(self, bucket: int, inputs: Mapping[str, Any]) -> list[Tensor]:
        """What the ONNX graph of a bucket gives when every half in it is taken as float32."""
        run = WideRun(self.made[bucket], self.settings.half)
        return run.outputs(self._tensors(bucket, inputs))

    def rounded_outputs(self, bucket: int, inputs: Mapping[str, Any]) -> list[Tensor]:
        """What hardware gives for the ONNX graph of a bucket, with its own choice of tokens."""
        return self.rounded_run(bucket).outputs(self._tensors(bucket, inputs))

    def rounded_run(self, bucket: int) -> HalfRun:
        """Runs the program of a bucket as hardware does."""
        return HalfRun(self.made[bucket], self.settings.half)

    def _tensors(self, bucket: int, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        weights = self.made[bucket].state_dict.values()
        device = next((tensor.device for tensor in weights), None)
        return {name: torch.as_tensor(inputs[name], device=device) for name in self.inputs}

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "type": self.settings.precision,
            "float32_islands": list(self.islands),
            "limit": _limit(self.settings),
            "states": self.states,
            "swapped_tokens": self.swapped,
            "ranges": {name: dataclasses.asdict(found) for name, found in self.ranges.items()},
            **self._int8_inputs(),
        }

    def _int8_inputs(self) -> dict[str, Any]:
        """Weight -> the largest magnitude that its layers read; nothing without int8."""
        if self.int8 is None:
            return {}
        found = {name.removeprefix(f"{WRAPPED}."): value for name, value in self.int8.items()}
        return {"int8_inputs": found}


def half_graphs(
    frozen: Sequence[Program],
    settings: HalfSettings,
    golden: Callable[[int], Mapping[str, Tensor]],
) -> HalfGraphs:
    """Make half-precision or int8 programs of FROZEN ones, and hold each to its float32 outputs on every state.

    Args:
        frozen: one program per timestep bucket, in float32.
        settings: states and tolerance.
        golden: inputs of a bucket that are looked at in any case.

    Raises:
        AccuracyError: NaN, infinity, or a larger difference; names the block of the largest values.
        EnvironmentMissingError: int8 is asked for and ModelOpt is not installed.
    """
    int8_ranges = Int8Ranges() if settings.precision == "int8" else None
    given = settings.states or [()] * len(frozen)
    names = list(frozen[0].example)
    states = [
        [{name: state[name] for name in names} for state in (golden(bucket), *given[bucket])]
        for bucket in range(len(frozen))
    ]
    exported = [exported_program(program) for program in frozen]
    ranges: dict[str, Range] = {}
    looked_at: list[list[_Looked]] = []
    for program, wide, inputs in zip(frozen, exported, states, strict=True):
        watch = int8_ranges.watch(wide, program) if int8_ranges else {}
        recorder = Ranges(wide, program, watch)
        looked_at.append(
            [_Looked(state, recorder.outputs(state), recorder.chosen) for state in inputs]
        )
        for block, found in recorder.found.items():
            ranges[block] = found.joined(ranges.get(block, found))
    islands = settings.islands
    if islands is None:
        limit = _limit(settings) or math.inf
        islands = tuple(block for block, found in ranges.items() if found.largest > limit)
    int8 = int8_ranges.largest() if int8_ranges else None
    made = {
        bucket: _made(wide, program, islands, settings.half, int8)
        for bucket, (program, wide) in enumerate(zip(frozen, exported, strict=True))
    }
    runs = [HalfRun(program, settings.half) for program in made.values()]
    rows = []
    for bucket, (run, looked) in enumerate(zip(runs, looked_at, strict=True)):
        row = _worst(run, looked, settings, bucket)
        if not row.passed:
            raise AccuracyError(_too_far(row, settings, ranges, islands))
        rows.append(row)
    kept = sum(run.kept for run in runs)
    swapped = sum(run.swapped for run in runs) / kept if kept else 0.0
    count = sum(len(inputs) for inputs in states)
    inputs_of_all = tuple(frozen[0].example)
    return HalfGraphs(
        settings, islands, ranges, count, swapped, tuple(rows), made, inputs_of_all, int8
    )


def _limit(settings: HalfSettings) -> float | None:
    """Blocks with larger values stay in float32; None where the type has no nearer end than float32."""
    return LARGEST_HALF / HEADROOM if settings.half == "fp16" else None


def _made(
    wide: ExportedProgram,
    program: Program,
    islands: Collection[str],
    precision: HalfPrecision,
    int8: Mapping[str, float] | None,
) -> ExportedProgram:
    made = compute_in_half(wide, program, islands, precision)
    return made if int8 is None else compute_in_int8(made, program, int8)


class _Looked(NamedTuple):
    """A state, and what float32 made of it."""

    inputs: Mapping[str, Tensor]
    outputs: list[Tensor]
    chosen: list[Tensor]


def _worst(
    run: HalfRun, looked: Sequence[_Looked], settings: HalfSettings, bucket: int
) -> Parity:
    step, allowed = step_of(settings.precision), settings.allowed
    rows = []
    for state in looked:
        found = run.outputs_with(state.inputs, state.chosen)
        rows.append(compare(step, found, state.outputs, allowed, bucket, "rel_l2"))
    return max(rows, key=lambda row: (not row.passed, row.non_finite, row.rel_l2))


def _too_far(
    row: Parity, settings: HalfSettings, ranges: Mapping[str, Range], islands: Sequence[str]
) -> str:
    half = {block: found for block, found in ranges.items() if block not in islands}
    worst = sorted(half, key=lambda block: -half[block].largest)[:3]
    named = "; ".join(
        f"{block or OUTSIDE} up to {half[block].largest:.3g} ({half[block].where})"
        for block in worst
    )
    end = f"float16 ends at {LARGEST_HALF:.0f}; " if settings.half == "fp16" else ""
    return (
        f"bucket {row.bucket}: {NAMES[settings.precision]} differs from float32 by a relative L2 of {row.rel_l2:.1e}, "
        f"allowed {row.tolerance:.0e}, with {row.non_finite} values NaN or infinite. {end}"
        f"the largest values of products are in {named or 'no block'}. Float32 "
        f"islands: {[name or OUTSIDE for name in islands]}. Export with precision fp32, give states of "
        "a whole sampling run, or raise precision_tolerance."
    )
