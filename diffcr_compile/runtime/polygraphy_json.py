"""Inputs and outputs in the JSON of NVIDIA's Polygraphy, read and written without it.

``polygraphy run graph.onnx --trt --load-inputs inputs.json --save-outputs outputs.json`` then runs the golden
inputs, and what it gave can be compared here. Arrays are ``.npy`` bytes in base64.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import UsageError

Array = npt.NDArray[Any]
_KIND = "polygraphy_class"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What base64 and the reader of numpy's headers, which is Python's own parser, raise for some bytes.
_TROUBLE = (
    KeyError,
    ValueError,
    TypeError,
    OSError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    MemoryError,
    RecursionError,
)


def write_inputs(path: Path, calls: Sequence[Mapping[str, Array]]) -> None:
    """Write what ``--load-inputs`` reads: a list of calls, each input -> array."""
    rows = [{name: _from_array(array) for name, array in call.items()} for call in calls]
    atomic_write_bytes(path, json.dumps(rows, indent=1).encode())


def write_outputs(path: Path, runner: str, calls: Sequence[Mapping[str, Array]]) -> None:
    """Write what ``--load-outputs`` reads.

    Args:
        path: of the file.
        runner: how the results are called in Polygraphy's reports.
        calls: output -> array, for each call.
    """
    results = [
        {
            "outputs": {
                name: {"values": _from_array(array), _KIND: "LazyArray"}
                for name, array in call.items()
            },
            "runtime": None,
            "runner_name": runner,
            _KIND: "IterationResult",
        }
        for call in calls
    ]
    data = {"lst": [[runner, results]], _KIND: "RunResults"}
    atomic_write_bytes(path, json.dumps(data, indent=1).encode())


def read_inputs(path: Path) -> list[dict[str, Array]]:
    """Calls that ``--save-inputs`` wrote.

    Raises:
        UsageError: the file is no such list.
    """
    data = _read(path)
    if not isinstance(data, list):
        raise _no(path, "a list of calls")
    return [_call(path, call) for call in data]


def read_outputs(path: Path) -> dict[str, list[dict[str, Array]]]:
    """Runner -> outputs of each call, as ``--save-outputs`` wrote them.

    Raises:
        UsageError: the file holds no results.
    """
    data = _read(path)
    if not isinstance(data, dict) or data.get(_KIND) != "RunResults":
        raise _no(path, "results (--save-outputs)")
    try:
        return {
            str(runner): [_call(path, result["outputs"]) for result in results]
            for runner, results in data["lst"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _no(path, f"results ({type(error).__name__}: {error})") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is no JSON of Polygraphy: {error}", code="DCR-U006"
        ) from error


def _call(path: Path, call: Any) -> dict[str, Array]:
    if not isinstance(call, dict):
        raise _no(path, "tensors by name")
    return {str(name): _to_array(path, value) for name, value in call.items()}


def _from_array(array: Array) -> dict[str, str]:
    data = io.BytesIO()
    np.save(data, np.asarray(array), allow_pickle=False)
    return {"array": base64.b64encode(data.getvalue()).decode("ascii"), _KIND: "ndarray"}


def _to_array(path: Path, value: Any) -> Array:
    if isinstance(value, dict) and value.get(_KIND) in ("LazyArray", "LazyNumpyArray"):
        value = value.get("values")
    if not isinstance(value, dict) or value.get(_KIND) != "ndarray":
        raise _no(path, "arrays of numpy")
    try:
        data = base64.b64decode(str(value["array"]).encode("ascii"), validate=True)
        return _from_npy(data)
    except _TROUBLE as error:
        raise _no(path, f"arrays of numpy ({type(error).__name__}: {error})") from error


def _from_npy(data: bytes) -> Array:
    """The array of ``.npy`` bytes. What says that it is larger than it is gets no memory."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the .npy format")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.kind not in "biufc":
        raise ValueError(f"elements of type {dtype}, expected numbers")
    found = len(data) - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != found:
        raise ValueError(f"{found} bytes for shape {shape} of {dtype}")
    stream.seek(0)
    array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _no(path: Path, wanted: str) -> UsageError:
    return UsageError(
        f"{path} does not hold {wanted} in Polygraphy's JSON; write it with polygraphy 0.38 or newer",
        code="DCR-U006",
    )
