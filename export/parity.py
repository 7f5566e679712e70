"""Agreement of two executions, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import AccuracyError
from diffcr_compile.export.golden import golden_path, read_golden
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.complex_inputs import as_graph_input

Array = npt.NDArray[Any]
Measure = Literal["max_abs", "rel_l2"]
NOISE = 1e-4  # of the largest output's size


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far one execution is from another.

    Attributes:
        step: which two, for the reader: ``FROZEN -> ONNX Runtime``.
        bucket: the timestep bucket; None if it is about all of them.
        max_abs: largest absolute difference of finite values.
        rel_l2: norm of the difference over the norm of what was expected, of the output where that is largest.
        cosine: of the two as vectors, 1 if both are zero; of the output where that is smallest.
        non_finite: NaN and infinite values in what was found.
        tolerance: allowed `max_abs`, or `rel_l2`.
        passed: within the tolerance, and every value finite.
        measure: which of the two the tolerance is about.
    """

    step: str
    bucket: int | None
    max_abs: float
    rel_l2: float
    cosine: float
    non_finite: int
    tolerance: float
    passed: bool
    measure: Measure = "max_abs"


def compare(
    step: str,
    found: Sequence[Any],
    expected: Sequence[Any],
    tolerance: float,
    bucket: int | None = None,
    measure: Measure = "max_abs",
) -> Parity:
    """Compare lists of arrays or tensors, in float64, each with its own: a large one hides no small one.

    An output smaller than a ten-thousandth of the largest is held to that size: it may be what is left of numbers that cancel out.

    Raises:
        AccuracyError: the numbers of outputs or their shapes differ, so nothing can be compared.
    """
    left, right = [_float64(v) for v in found], [_float64(v) for v in expected]
    shapes = [[a.shape for a in arrays] for arrays in (left, right)]
    if shapes[0] != shapes[1]:
        raise AccuracyError(
            f"{step}{'' if bucket is None else f', bucket {bucket}'}: outputs of shapes "
            f"{shapes[0]}, expected {shapes[1]}. The two do not compute the same thing."
        )
    non_finite, pairs = 0, []
    for got, want in zip(map(np.ravel, left), map(np.ravel, right), strict=True):
        # A NaN that was expected too is no agreement: nothing useful can be said about such a model.
        finite = np.isfinite(got) & np.isfinite(want)
        non_finite += int(finite.size - finite.sum())
        pairs.append((got[finite], want[finite]))
    noise = NOISE * max((_rms(want) for _, want in pairs), default=0.0)
    max_abs = max((float(np.abs(g - w).max(initial=0.0)) for g, w in pairs), default=0.0)
    rel_l2 = max((_relative(g, w, noise) for g, w in pairs), default=0.0)
    cosine = min((_cosine(g, w) for g, w in pairs if _rms(w) >= noise), default=1.0)
    error = {"max_abs": max_abs, "rel_l2": rel_l2}[measure]
    return Parity(
        step=step,
        bucket=bucket,
        max_abs=max_abs,
        rel_l2=rel_l2,
        cosine=cosine,
        non_finite=non_finite,
        tolerance=tolerance,
        passed=non_finite == 0 and error <= tolerance,
        measure=measure,
    )


def run_onnx(
    path: Path, inputs: Mapping[str, Array], threads: int | None = None
) -> list[Array]:
    """Outputs of an ONNX file in ONNX Runtime on the CPU."""
    session = make_session(path, threads=threads)
    outputs: list[Array] = session.run(
        None, {name: as_graph_input(array) for name, array in inputs.items()}
    )
    return outputs


def compare_open_graph(
    folder: Path,
    row: Mapping[str, Any],
    kept_tokens: Mapping[str, Sequence[int]],
    step: str,
    gate: tuple[float, Measure],
    *,
    path: Path | None = None,
    run: Callable[[Sequence[Mapping[str, Array]]], list[list[Array]]] | None = None,
    expected: Callable[[int, Mapping[str, Array]], Sequence[Any]] | None = None,
) -> Iterator[Parity]:
    """ONNX Runtime against the golden outputs for every bucket of a graph with open K.

    Args:
        folder: the artifact.
        row: of the manifest's ``profile_graphs``. One with no open K is the graph of its bucket, which is
            compared anyway: for it, nothing comes.
        kept_tokens: block -> K per bucket.
        step: which two executions, for the reader.
        gate: tolerance, and what it is about.
        path: another file in the place of the graph.
        run: runs it for each of several inputs; None for a session.
        expected: what to compare with in a bucket on its inputs; None for the golden outputs.
    """
    if not row["kept_inputs"]:
        return
    run = run or in_a_session(path or folder / row["onnx"])
    given, wanted = [], []
    for bucket in row["buckets"]:
        inputs, golden = read_golden(folder / golden_path(bucket))
        wanted.append(golden if expected is None else expected(bucket, inputs))
        arrays = {name: as_graph_input(array) for name, array in inputs.items()}
        for name, block in row["kept_inputs"].items():
            arrays[name] = np.zeros(kept_tokens[block][bucket], np.float32)
        given.append(arrays)
    for bucket, found, outputs in zip(row["buckets"], run(given), wanted, strict=True):
        yield compare(step, found, outputs, gate[0], bucket, gate[1])


def in_a_session(
    path: Path, threads: int | None = None
) -> Callable[[Sequence[Mapping[str, Array]]], list[list[Array]]]:
    """Outputs of a file for each of several inputs, in one session."""
    session = make_session(path, threads=threads)
    return lambda inputs: [session.run(None, dict(given)) for given in inputs]


def _float64(value: Any) -> npt.NDArray[np.float64]:
    if hasattr(value, "detach"):  # a tensor; bfloat16 has no numpy type, float64 has
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    # Never infinity: the figure goes into JSON.
    return error / max(norm, 1e-154)


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(values)) / math.sqrt(max(values.size, 1))


def _relative(
    got: npt.NDArray[np.float64], want: npt.NDArray[np.float64], noise: float
) -> float:
    return _ratio(_rms(got - want), max(_rms(want), noise))


def _cosine(got: npt.NDArray[np.float64], want: npt.NDArray[np.float64]) -> float:
    norms = math.sqrt(float(got @ got)) * math.sqrt(float(want @ want))
    if norms == 0:
        return float(np.array_equal(got, want))
    return float(np.clip(got @ want / norms, -1.0, 1.0))
