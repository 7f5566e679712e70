"""TensorRT or TensorRT-RTX, where one of them can be imported; engines are built on this device."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engines import Engine, UnavailableError
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.export.device.tensorrt_api import build_engine

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "INT64": torch.int64,
    "INT32": torch.int32,
}


def check(name: str) -> Any:
    """The module.

    Raises:
        UnavailableError: it cannot be imported, or there is no CUDA device.
    """
    try:
        trt = importlib.import_module(name)
    except Exception as error:
        raise UnavailableError(f"{name}: {error}") from error
    if not torch.cuda.is_available():
        raise UnavailableError(f"{name} {trt.__version__} runs on a CUDA device only")
    return trt


def make(name: str, path: Path, inputs: Mapping[str, Tensor]) -> Engine:
    """Build and load an engine.

    Args:
        name: module, ``tensorrt`` or ``tensorrt_rtx``.
        path: an ONNX file with static shapes.
        inputs: by name, on the device.

    Raises:
        UnavailableError: see :func:`check`; or the library refuses this device or graph, in its words.
    """
    trt = check(name)
    try:
        data = build_engine(trt, path, ({},), BuildSettings())
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
        context = None if engine is None else engine.create_execution_context()
    except Exception as error:
        raise UnavailableError(f"{name} {trt.__version__}: {error}") from error
    if context is None:
        raise UnavailableError(
            f"{name} {trt.__version__} built an engine that it cannot load here"
        )
    return _loaded(trt, engine, context, inputs)


def _loaded(trt: Any, engine: Any, context: Any, inputs: Mapping[str, Tensor]) -> Engine:
    stream = torch.cuda.Stream()
    tensors: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            tensors[name] = inputs[name].contiguous()
        else:
            kind = _TYPES[engine.get_tensor_dtype(name).name]
            shape = tuple(engine.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=kind, device="cuda")
            outputs.append(tensors[name])
        context.set_tensor_address(name, tensors[name].data_ptr())

    def run() -> None:
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("execute_async_v3 returned False")

    # the closure keeps the engine and the inputs alive as long as the context
    return Engine(run, lambda: (engine, tensors) and outputs, (f"version {trt.__version__}",))
