"""One ONNX graph -> the bytes of an engine, with calls that TensorRT 10.3 to 11 and TensorRT-RTX share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.engine_plan import Bounds
from diffcr_compile.errors import UnsupportedModelError, UsageError
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.progress import PhaseProgress

ProfileBounds = Mapping[str, Bounds]


def build_engine(
    trt: Any,
    onnx: Path,
    profiles: Sequence[ProfileBounds],
    settings: BuildSettings,
    timing_cache: Path | None = None,
    progress: PhaseProgress | None = None,
) -> bytes:
    """Build an engine.

    Args:
        trt: TensorRT's or TensorRT-RTX's module.
        onnx: the graph; its weights lie beside it.
        profiles: smallest, typical and largest shape of the inputs that the graph leaves open, per
            profile; one empty profile for a static graph.
        settings: how.
        timing_cache: read before and written after the build; None for none.
        progress: called while TensorRT works.

    Raises:
        UsageError: TensorRT-RTX does not know the compute capability.
        UnsupportedModelError: the parser or the builder refuses the graph; says what it said.
    """
    said, logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise UnsupportedModelError(
            f"the parser of TensorRT {trt.__version__} refuses {onnx.name}: "
            f"{'; '.join(reasons[:3]) or _spoken(said)}. Run diffcr lint with your target.",
            code="DCR-M004",
        )
    config = builder.create_builder_config()
    monitor = _monitor(trt, progress) if progress is not None else None
    if monitor is not None:
        config.progress_monitor = monitor
    _configure(trt, config, settings)
    _add_profiles(builder, config, profiles)
    cache = _load_timing_cache(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnsupportedModelError(
            f"TensorRT {trt.__version__} cannot build {onnx.name}: {_spoken(said)}. If it speaks of memory, "
            "free some or lower --workspace; else run diffcr lint with your target.",
            code="DCR-M004",
        )
    if cache is not None and timing_cache is not None:
        from diffcr_compile.durable import atomic_write_bytes

        atomic_write_bytes(timing_cache, bytes(cache.serialize()))
    return bytes(engine)


def network_flags(trt: Any) -> int:
    """Strong typing, so that the graph's types are kept; from TensorRT 11 on there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(trt: Any, config: Any, settings: BuildSettings) -> None:
    # A product in float32 stays one: with TF32 a router's scores would be rounded to 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Layers then name the ONNX nodes that they were fused of; it costs a few bytes of the plan.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace_mb is not None:
        size = settings.workspace_mb << 20
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if settings.compute_capability is not None:
        known = sorted(n for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
        if settings.compute_capability not in known:
            raise UsageError(
                f"TensorRT-RTX {trt.__version__} has no compute capability "
                f"{settings.compute_capability!r}, it has {known}"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(
            getattr(trt.ComputeCapability, settings.compute_capability), 0
        )


def _add_profiles(builder: Any, config: Any, profiles: Sequence[ProfileBounds]) -> None:
    """One profile each; none for a static graph."""
    for number, bounds in enumerate(profiles):
        if not bounds:
            continue
        profile = builder.create_optimization_profile()
        for name, shapes in bounds.items():
            profile.set_shape(name, *shapes)
        if number > 0 and hasattr(profile, "extra_memory_target"):
            profile.extra_memory_target = 0.0  # later profiles use the weights of the first
        config.add_optimization_profile(profile)


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """What earlier builds measured on this device; an empty cache the first time; None for none."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # of another TensorRT or device: measured anew
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, progress: PhaseProgress) -> Any:
    """TensorRT's progress, told by its outermost phases; the inner ones come and go in milliseconds."""
    base = getattr(trt, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[misc, valid-type]  # the wheel has no type information
        def __init__(self) -> None:
            super().__init__()
            self.outer: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.outer[name] = steps
                progress(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.outer:
                progress(name, step + 1, self.outer[name])
            return True

        def phase_finish(self, name: str) -> None:
            steps = self.outer.pop(name, None)
            if steps is not None:
                progress(name, steps, steps)

    return Monitor()


def collecting_logger(trt: Any) -> tuple[list[str], Any]:
    """A list that fills with messages of failures, and the logger that fills it."""
    errors: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc]  # the wheel has no type information
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(" ".join(message.split()))

    return errors, Collector()


def _spoken(errors: list[str]) -> str:
    return "; ".join(errors[:3]) or "it gives no reason"
