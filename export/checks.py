"""Every graph of an artifact in the making, held to the program that it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import torch

from diffcr_compile.errors import AccuracyError, UnsupportedModelError, one_line
from diffcr_compile.export.bisect import block_values, load_graph, places_of_values
from diffcr_compile.export.block_values import BlockValue
from diffcr_compile.export.golden import golden_path, read_golden
from diffcr_compile.export.in_pieces import (
    has_many_weights,
    piecewise,
    run_checked,
    run_in_pieces,
)
from diffcr_compile.export.parity import (
    Measure,
    Parity,
    compare,
    compare_open_graph,
    in_a_session,
)
from diffcr_compile.export.precision import HalfGraphs, HalfSettings
from diffcr_compile.export.widened import write_widened
from diffcr_compile.program import Program
from diffcr_compile.runtime.complex_inputs import as_graph_input

Array = npt.NDArray[Any]
STEP = "FROZEN -> ONNX Runtime"
# of bfloat16, which ONNX Runtime's CPU does not run
ROUNDED_STEP = "FROZEN -> bfloat16, with its own choice of tokens"
WIDE_STEP = "half precision -> ONNX Runtime, every half taken as float32"
# ONNX Runtime rounds a float16 graph as it likes; what a golden output may be off by is what it is off here,
# and as much again for another version of it, or for a device.
_AGAIN = 2.0


@dataclasses.dataclass
class Checks:
    """ONNX Runtime against FROZEN; a half-precision graph also against its program, to the last digits.

    ONNX Runtime has as many threads as torch: by itself it would take every core, and more of them than there is work
    for burn their time waiting.

    Attributes:
        folder: where the graphs and golden files are.
        tolerance: largest absolute difference where both sides round alike.
        settings: of half precision; None for float32.
        half: the half-precision programs.
        widened: what half-precision graphs were strictly held to, filled by the checks.
        values: graph -> what leaves its blocks, of graphs that were run in pieces; likewise.
    """

    folder: Path
    tolerance: float
    settings: HalfSettings | None
    half: HalfGraphs | None
    widened: list[Parity] = dataclasses.field(default_factory=list)
    values: dict[str, list[BlockValue]] = dataclasses.field(default_factory=dict)

    def bucket(self, graph: str, bucket: int) -> Parity:
        """The graph of a bucket against its golden outputs.

        Raises:
            AccuracyError: it differs by more than the tolerance.
        """
        path = self.folder / graph
        check_valid(path)
        inputs, golden = read_golden(self.folder / golden_path(bucket))
        found = self._outputs(graph, inputs)
        if self.half is not None:
            return self._half_bucket(graph, bucket, inputs, golden, found)
        return _passed(compare(STEP, found, golden, self.tolerance, bucket), graph)

    def runnable(self, graph: str) -> Path:
        """The graph, or where ONNX Runtime's CPU lacks the kernels for it, the widened one."""
        bfloat16 = self.settings is not None and self.settings.half == "bf16"
        return self._wide(graph) if bfloat16 else self.folder / graph

    def shared(self, row: Mapping[str, Any], program: Program) -> list[Parity]:
        """A graph of several buckets, at each of them; none if it is the graph of its bucket.

        Raises:
            AccuracyError: a bucket differs by more than the tolerance.
        """
        if not row["kept_inputs"]:
            return []
        assert program.schedule is not None
        graph = str(row["onnx"])
        path, half = self.folder / graph, self.half
        check_valid(path)
        file, threads = path if half is None else self._wide(graph), torch.get_num_threads()
        rows = compare_open_graph(
            self.folder,
            row,
            program.schedule.kept_tokens,
            f"{STEP if half is None else WIDE_STEP}, {graph}",
            self._strict(),
            path=file,
            run=piecewise(file, threads) or in_a_session(file, threads),
            expected=None if half is None else half.wide_outputs,
        )
        return [_passed(found, graph) for found in rows]

    def _half_bucket(
        self,
        graph: str,
        bucket: int,
        inputs: Mapping[str, Array],
        golden: Sequence[Array],
        found: list[Array],
    ) -> Parity:
        """A half-precision graph, of which `found` are the outputs: strictly where nothing is rounded, then with rounding."""
        assert self.half is not None
        assert self.settings is not None
        runs_as_it_is = self.runnable(graph) == self.folder / graph
        found_wide = found
        if runs_as_it_is:
            found_wide = run_checked(self._wide(graph), inputs, torch.get_num_threads())
        expected, (limit, measure) = self.half.wide_outputs(bucket, inputs), self._strict()
        strict = compare(WIDE_STEP, found_wide, expected, limit, bucket, measure)
        self.widened.append(_passed(strict, graph))
        step, rounded = (
            (STEP, found)
            if runs_as_it_is
            else (ROUNDED_STEP, self.half.rounded_outputs(bucket, inputs))
        )
        row = compare(step, rounded, golden, self.settings.allowed, bucket, "rel_l2")
        allowed = max(self.settings.allowed, _AGAIN * row.rel_l2)
        return _passed(
            dataclasses.replace(row, tolerance=allowed, passed=row.non_finite == 0), graph
        )

    def _strict(self) -> tuple[float, Measure]:
        """How near an ONNX graph must be to its program where neither rounds to float16.

        Two runs in int8 are as far apart as int8 is from float32: an activation between two levels goes to
        either for a difference in the last digit, and then tokens swap.
        """
        if self.settings is not None and self.settings.precision == "int8":
            return self.settings.allowed, "rel_l2"
        return self.tolerance, "max_abs"

    def _outputs(self, graph: str, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs of a graph; where it is run in pieces, also what leaves its blocks on the way."""
        path = self.runnable(graph)
        model = load_graph(path)
        if graph in self.values or not has_many_weights(model):
            return run_checked(path, inputs, torch.get_num_threads())
        places = places_of_values(self.folder, graph, load_graph(self.folder / graph))
        names = [value.name for value in model.graph.output]
        given = {name: as_graph_input(array) for name, array in inputs.items()}
        (arrays,) = run_in_pieces(
            path,
            model,
            [*names, *(p[1] for p in places)],
            [given],
            threads=torch.get_num_threads(),
        )
        self.values[graph] = block_values(places, arrays[len(names) :])
        return arrays[: len(names)]

    def _wide(self, graph: str) -> Path:
        """The graph with float32 in the place of halves, made once."""
        path = self.folder / "widened" / Path(graph).name
        if not path.exists():
            write_widened(
                self.folder / graph, path, self.settings.half if self.settings else "fp16"
            )
        return path


def check_valid(path: Path) -> None:
    """Raise UnsupportedModelError unless the file is valid ONNX."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.onnx.export made an invalid graph of this model: {one_line(error)}. Replace the op "
            "that it names by plain torch ops."
        ) from error


def _passed(row: Parity, graph: str) -> Parity:
    if not row.passed:
        raise AccuracyError(
            f"bucket {row.bucket}: ONNX Runtime differs from {row.step.partition(' ')[0]} by "
            f"{row.max_abs:.1e} in {graph} (relative L2 {row.rel_l2:.1e}, {row.non_finite} values NaN or "
            f"infinite), allowed {row.tolerance:.0e}. "
            "Check that timestep_high is the model's own (1 for some, 1000 for most): sines of far "
            "too large timesteps differ between executors. Two tokens of nearly equal score may "
            "also swap at the cut; then raise parity_tolerance. Else a graph is wrong: report it."
        )
    return row
