"""Measure a latency table on the device, with numpy and ONNX Runtime alone.

From a kit that ``diffcr bench MODEL --kit KIT`` wrote elsewhere::

    python -m diffcr_compile.runtime.block_bench KIT -o table.json --provider cuda
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.durable import write_json_atomic
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import sha256_file
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.complex_inputs import as_graph_input
from diffcr_compile.runtime.latency import (
    MOST_ROUNDS,
    STABILITY,
    MeasuredGroup,
    Run,
    Subject,
    measure,
)
from diffcr_compile.runtime.onnx_structure import check_onnx

KIT_FILE = "kit.json"


def open_kit(folder: Path, provider: str = "cpu", threads: int | None = None) -> Subject:
    """The graphs of a kit in ONNX Runtime.

    Raises:
        ArtifactError: the folder holds no kit, or a file of it was changed.
    """
    kit = _read_kit(folder)

    def run(graph: Mapping[str, Any]) -> Run:
        path = folder / _inside(folder, graph["onnx"])
        check_onnx(path, folder / _inside(folder, kit["weights"]), graph["inputs"])
        return _bound_run(path, graph["inputs"], provider, threads)

    groups = [
        MeasuredGroup(
            tuple(g["blocks"]), {int(k): run(graph) for k, graph in g["graphs"].items()}
        )
        for g in kit["groups"]
    ]
    return Subject(
        kit["model"], groups, run(kit["dense"]), run(kit["check"]), kit["check"]["kept_tokens"]
    )


def _read_kit(folder: Path) -> dict[str, Any]:
    path = folder / KIT_FILE
    again = "Write it anew with diffcr bench MODEL --kit."
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {KIT_FILE}. {again}", code="DCR-A021")
    try:
        kit: dict[str, Any] = json.loads(path.read_text())
        for name, digest in kit["files"].items():
            if sha256_file(folder / _inside(folder, name)) != digest:
                raise ArtifactError(f"{folder / name} was changed. {again}", code="DCR-A021")
        graphs = [
            kit["dense"],
            kit["check"],
            *(g for row in kit["groups"] for g in row["graphs"].values()),
        ]
        unknown = {g["onnx"] for g in graphs} | {kit["weights"]}
        unknown -= set(kit["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged: {type(error).__name__}: {error}. {again}", code="DCR-A021"
        ) from error
    if unknown:
        raise ArtifactError(
            f"{path} uses {sorted(unknown)} without a hash. {again}", code="DCR-A021"
        )
    return kit


def _inside(folder: Path, name: str) -> str:
    """A file's name, after refusing what leads out of the folder."""
    if Path(name).name != name or (folder / name).is_symlink():
        raise ArtifactError(
            f"{folder / KIT_FILE} names {name!r}, which is no file of the kit. Do not use it.",
            code="DCR-A021",
        )
    return name


def _bound_run(
    path: Path, inputs: Sequence[Mapping[str, Any]], provider: str, threads: int | None
) -> Run:
    """One call of a graph whose inputs lie on the device already, as they do between blocks."""
    import onnxruntime

    session = make_session(path, provider, threads)
    binding = session.io_binding()
    generator = np.random.default_rng(0)
    for spec in inputs:
        value = as_graph_input(_random(spec, generator))
        binding.bind_ortvalue_input(
            spec["name"], onnxruntime.OrtValue.ortvalue_from_numpy(value, provider, 0)
        )
    for output in session.get_outputs():
        binding.bind_output(output.name, provider)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _random(spec: Mapping[str, Any], generator: np.random.Generator) -> npt.NDArray[Any]:
    dtype: np.dtype[Any] = np.dtype(spec["dtype"])
    if np.issubdtype(dtype, np.inexact):
        noise: npt.NDArray[Any] = generator.standard_normal(spec["shape"]).astype(dtype)
        return noise
    # An index of 0 is always valid, and a mask that hides everything is no usual case.
    return np.full(spec["shape"], dtype == np.bool_, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m diffcr_compile.runtime.block_bench``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kit", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--stability", type=float, default=STABILITY)
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS)
    given = parser.parse_args(arguments)
    table = measure(
        open_kit(given.kit, given.provider, given.threads),
        onnxruntime_backend(given.provider, given.threads),
        given.stability,
        given.rounds,
    )
    write_json_atomic(given.out, table)


def onnxruntime_backend(provider: str, threads: int | None) -> dict[str, Any]:
    """How a table names ONNX Runtime."""
    return {
        "name": "onnxruntime",
        "device": provider,
        "threads": threads or os.cpu_count() or 1,
    }


if __name__ == "__main__":
    main()
