"""ONNX Runtime with inputs and outputs bound on the device, so that nothing but its own work is timed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.engines import Engine, UnavailableError
from diffcr_compile.errors import EnvironmentMissingError
from diffcr_compile.runtime.backend import make_session

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}


def make(path: Path, inputs: Mapping[str, Tensor]) -> Engine:
    """A graph on the device of its inputs.

    Raises:
        UnavailableError: ONNX Runtime or its CUDA provider is not there.
    """
    device = next(iter(inputs.values())).device.type
    try:
        if device == "cuda":
            _preload()
        session = make_session(path, device)
    except EnvironmentMissingError as error:
        raise UnavailableError(str(error)) from error
    binding, outputs = _bound(session, inputs, device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return Engine(run, lambda: [value.numpy() for value in outputs], _remarks(session))


def _preload() -> None:
    """The CUDA libraries that pip installed, torch's among them; the provider itself does not look there."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is None:
        return
    try:
        preload()
    except Exception as error:  # noqa: BLE001 - the session will say what is missing
        print(f"onnxruntime.preload_dlls: {error}", file=sys.stderr)


def _bound(session: Any, inputs: Mapping[str, Tensor], device: str) -> tuple[Any, list[Any]]:
    """A binding with inputs and outputs on the device, and the outputs."""
    import onnxruntime

    values = onnxruntime.OrtValue
    binding = session.io_binding()
    for given in session.get_inputs():
        array = inputs[given.name].cpu().numpy()
        binding.bind_ortvalue_input(given.name, values.ortvalue_from_numpy(array, device, 0))
    outputs = []
    for made in session.get_outputs():
        value = values.ortvalue_from_shape_and_type(made.shape, _TYPES[made.type], device, 0)
        binding.bind_ortvalue_output(made.name, value)
        outputs.append(value)
    binding.synchronize_inputs()
    return binding, outputs


def _remarks(session: Any) -> tuple[str, ...]:
    threads = f", {torch.get_num_threads()} threads" if not torch.cuda.is_available() else ""
    return (f"providers {', '.join(session.get_providers())}{threads}",)
