"""Golden inputs and outputs per timestep bucket: what a runtime or an engine must reproduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import ArtifactError
from diffcr_compile.runtime.complex_inputs import as_graph_input
from diffcr_compile.runtime.safetensors_file import read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


def golden_path(bucket: int) -> str:
    """Path of a bucket's golden file, relative to the artifact."""
    return f"golden/bucket_{bucket:02d}.safetensors"


def write_golden(
    folder: Path, bucket: int, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]
) -> Path:
    """Write ``golden/bucket_XX.safetensors``: ``input.<name>`` and ``output.<name>``.

    Args:
        folder: the artifact.
        bucket: index of the timestep bucket.
        inputs: by the names of the graph's inputs; complex ones are stored as the graph takes them, real
            with a last axis of 2.
        outputs: in the order of the graph's outputs.

    Returns:
        The file's path.
    """
    from safetensors.numpy import (
        save,  # not at the top: devices read golden files, hosts write them
    )

    tensors = {f"input.{name}": _array(tensor) for name, tensor in inputs.items()}
    names = output_names(len(outputs))
    tensors |= {f"output.{n}": _array(t) for n, t in zip(names, outputs, strict=True)}
    path = folder / golden_path(bucket)
    atomic_write_bytes(path, save(tensors))
    return path


def read_golden(path: Path) -> tuple[dict[str, Array], list[Array]]:
    """Inputs by name, and outputs in the order of the graph's outputs; numpy only.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    tensors = read_safetensors(path)
    inputs = {
        k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")
    }
    names = [f"output.{n}" for n in output_names(len(tensors) - len(inputs))]
    if set(names) != {name for name in tensors if not name.startswith("input.")}:
        raise ArtifactError(
            f"{path} holds the tensors {sorted(tensors)!s:.200}, expected inputs and {names}. Copy the artifact "
            "again, or make it anew with diffcr compile.",
            code="DCR-A004",
        )
    return inputs, [tensors[name] for name in names]


def output_names(count: int) -> list[str]:
    """Names of a graph's outputs."""
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(as_graph_input(tensor.detach().resolve_conj().cpu().numpy()))
