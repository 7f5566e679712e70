"""ONNX -> TensorRT-RTX engine for a named compute capability, on a machine without a GPU.

The engine is a check and never the deliverable: its list of compute capabilities has no Jetson (SM86 is
the nearest to Orin's SM87), and an engine for a device is built on that device. Only a build tells what
TensorRT takes: the parser also accepts what the builder then refuses, such as a TopK of 4,000.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from diffcr_compile.engine_plan import Bounds
from diffcr_compile.errors import EnvironmentMissingError, UnsupportedModelError, UsageError

_SCRATCH = re.compile(r"Total Activation Memory: (\d+)")


@dataclasses.dataclass(frozen=True)
class RtxEngine:
    """What a build gives.

    Attributes:
        data: the engine.
        activation_bytes: scratch memory of each profile, in their order. Attention that is not fused
            writes its scores there, at least heads x N x N of them.
    """

    data: bytes
    activation_bytes: tuple[int, ...]


def build_rtx_engine(model: bytes | Path, compute_capability: str = "SM86") -> bytes:
    """An engine of a static graph; the same model gives the same bytes. See :func:`build_rtx`."""
    return build_rtx(model, compute_capability).data


def build_rtx(
    model: bytes | Path,
    compute_capability: str = "SM86",
    profiles: Sequence[Mapping[str, Bounds]] = (),
) -> RtxEngine:
    """Build an engine.

    Args:
        model: an ONNX file, or the bytes of one whose weights lie inside.
        compute_capability: such as ``SM86``; no device of that kind need be present.
        profiles: smallest, typical and largest shape by input, of each profile; none, or empty ones, for
            a static graph.

    Raises:
        EnvironmentMissingError: TensorRT-RTX is not installed.
        UsageError: TensorRT-RTX does not know the compute capability, or the file does not exist.
        UnsupportedModelError: the parser or the builder refuses the model; says which node.
    """
    trt = _tensorrt_rtx()
    capability = _capability(trt, compute_capability)
    errors, scratch, logger = _collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # TensorRT-RTX types every network strongly
    parser = trt.OnnxParser(network, logger)
    if not _parse(parser, model):
        refused = [parser.get_error(number) for number in range(parser.num_errors)]
        reasons = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in refused]
        raise UnsupportedModelError(
            f"the parser of TensorRT-RTX refuses the ONNX graph: {'; '.join(reasons) or _said(errors)}. "
            "Replace the op that it names by standard ONNX ops."
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    for bounds in profiles:
        if not bounds:
            continue
        profile = builder.create_optimization_profile()
        for name, shapes in bounds.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnsupportedModelError(
            f"TensorRT-RTX cannot build the ONNX graph for {compute_capability}: {_said(errors)}"
        )
    return RtxEngine(bytes(engine), tuple(scratch))


def _tensorrt_rtx() -> ModuleType:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise EnvironmentMissingError(
            f"building an engine without a GPU needs TensorRT-RTX, which cannot be imported ({error}). "
            "Install it with: pip install 'diffcr-compile[rtx]' (Linux, x86-64)"
        ) from error
    module: ModuleType = tensorrt_rtx
    return module


def _capability(trt: Any, name: str) -> Any:
    known = sorted(n for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
    if name not in known:
        raise UsageError(
            f"TensorRT-RTX {trt.__version__} has no compute capability {name!r}, it has {known}"
        )
    return getattr(trt.ComputeCapability, name)


def _parse(parser: Any, model: bytes | Path) -> bool:
    if isinstance(model, bytes):
        return bool(parser.parse(model))
    if not model.is_file():
        raise UsageError(f"{model} is not a file")
    return bool(parser.parse_from_file(str(model)))  # finds the weights file beside it


def _collecting_logger(trt: Any) -> tuple[list[str], list[int], Any]:
    """Lists that fill with messages of failures and with scratch memory, and the logger that fills them."""
    errors: list[str] = []
    scratch: list[int] = []

    class Collector(trt.ILogger):  # type: ignore[misc]  # the wheel has no type information
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(" ".join(message.split()))
            found = _SCRATCH.search(message)
            if found:
                scratch.append(int(found.group(1)))

    return errors, scratch, Collector()


def _said(errors: list[str]) -> str:
    return "; ".join(errors[:3]) or "it gives no reason"
