"""The part of TensorRT's Python API that is used, computing with ONNX Runtime in a fake device's memory.

An engine is the ONNX model with its weights inside and a line about the build. What the real one demands
is demanded: the same version, a profile, shapes, scratch memory of the right size, every address.

FAKE_TRT_VERSION names the version; FAKE_TRT_KILL names an ONNX file during whose build the process is
killed, FAKE_TRT_WRONG one whose engine computes something else. FAKE_TRT_OUTPUT_TOKENS leaves the second
axis of outputs open in engines, and is its size in contexts.
"""

from __future__ import annotations

import enum
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

__version__ = os.environ.get("FAKE_TRT_VERSION", "10.3.0")
_MAJOR = int(__version__.split(".")[0])
_MAGIC = b"FAKE-ENGINE\n"


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, severity: int = ILogger.WARNING) -> None:
        self.severity = severity

    def log(self, severity: int, message: str) -> None:
        pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    if _MAJOR < 11:
        STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


if os.environ.get("FAKE_TRT_RTX"):

    class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
        LAZY, EAGER, NONE = range(3)


class ProfilingVerbosity(enum.IntEnum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class LayerInformationFormat(enum.IntEnum):
    ONELINE, JSON = range(2)


class IProgressMonitor:
    def __init__(self) -> None:
        self.ready = True


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"t"


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}
        self.extra_memory_target = 1.0

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        self.shapes[name] = [list(low), list(best), list(high)]


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.flags = {BuilderFlag.TF32}
        self.workspace: int | None = None
        self.progress_monitor: Any = None
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.cache: _TimingCache | None = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.workspace = size

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> _TimingCache:
        return _TimingCache(data)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True


class _Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.path: Path | None = None


class _Error:
    def __init__(self, text: str) -> None:
        self.text = text

    def desc(self) -> str:
        return self.text


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.network, self.logger = network, logger
        self.errors: list[_Error] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, number: int) -> _Error:
        return self.errors[number]

    def parse_from_file(self, path: str) -> bool:
        import onnx

        model = onnx.load(path)
        refused = [node.op_type for node in model.graph.node if node.op_type == "NonZero"]
        self.errors = [_Error(f"no importer for {op}") for op in refused]
        self.network.path = Path(path)
        return not refused


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> _Network:
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        import onnx

        assert network.path is not None
        monitor = config.progress_monitor
        if monitor is not None:
            assert monitor.ready  # the base class was initialised
            monitor.phase_start("building", None, 2)
            monitor.phase_start("inner", "building", 1)
            monitor.step_complete("inner", 0)
            monitor.phase_finish("inner")
            monitor.step_complete("building", 0)
        if os.environ.get("FAKE_TRT_KILL") == network.path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        model = onnx.load(str(network.path))
        if os.environ.get("FAKE_TRT_WRONG") == network.path.name:
            _make_wrong(model)
        strongly_typed = getattr(NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        facts = {
            "version": __version__,
            "sm": os.environ.get("FAKE_CUDA_SM", "87"),
            "strongly_typed": strongly_typed is None
            or bool(network.flags >> strongly_typed & 1),
            "tf32": BuilderFlag.TF32 in config.flags,
            "workspace": config.workspace,
            "timing": len(config.cache.data) if config.cache else None,
            "profiles": [profile.shapes for profile in config.profiles] or [{}],
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
            "layers": _layers(model),
            "extra_memory": [profile.extra_memory_target for profile in config.profiles],
        }
        if monitor is not None:
            monitor.step_complete("building", 1)
            monitor.phase_finish("building")
        return _MAGIC + json.dumps(facts).encode() + b"\n" + model.SerializeToString()


def _layers(model: Any) -> list[dict[str, str]]:
    """Two nodes to a layer, as if they were fused."""
    names = [node.name or node.op_type for node in model.graph.node]
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
    return [
        {
            "Name": f"__myl_{'_'.join(pair)}",
            "LayerType": "kgen",
            "Metadata": "\x1e".join(f"[ONNX Layer: {name}]" for name in pair),
        }
        for pair in pairs
    ]


def _make_wrong(model: Any) -> None:
    """The last output is computed, then scaled by 1.5."""
    from onnx import helper, numpy_helper

    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if output == name else output for output in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.5), "wrong"))
    model.graph.node.append(helper.make_node("Mul", ["before", "wrong"], [name]))


def facts_of(plan: bytes) -> dict[str, Any]:
    """What a plan says about its build; for tests."""
    found: dict[str, Any] = json.loads(plan[len(_MAGIC) :].split(b"\n", 1)[0])
    return found


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        facts = facts_of(plan)
        if facts["version"] != __version__ or facts["sm"] != os.environ.get(
            "FAKE_CUDA_SM", "87"
        ):
            return None
        return _Engine(facts, plan[len(_MAGIC) :].split(b"\n", 1)[1])


_TYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}


class _Engine:
    alive = 0

    def __init__(self, facts: dict[str, Any], model: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.facts = facts
        self.session = onnxruntime.InferenceSession(model, options)
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_dtype(self, name: str) -> str:
        return _TYPES[(self.inputs | self.outputs)[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = (self.inputs | self.outputs)[name].shape
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if name in self.outputs and "FAKE_TRT_OUTPUT_TOKENS" in os.environ:
            sizes[1] = -1
        return tuple(sizes)

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self.facts)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 4096 * (1 + profile)

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(self, settings: Any) -> _Context:
        context = _Context(self)
        if isinstance(settings, _RuntimeConfig):
            context.specialization = settings.dynamic_shapes_kernel_specialization_strategy
            settings = settings.strategy
        assert settings == ExecutionContextAllocationStrategy.USER_MANAGED
        return context


class _RuntimeConfig:
    def __init__(self) -> None:
        self.strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy = 0

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class _Inspector:
    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        assert form == LayerInformationFormat.JSON
        layers = self.facts["layers"]
        return json.dumps(
            {"Layers": layers if self.facts["detailed"] else [x["Name"] for x in layers]}
        )


def nptype(dtype: str) -> Any:
    return np.dtype(dtype).type


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.specialization: int | None = None
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory: tuple[int, int] | None = None
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        if number >= len(self.engine.facts["profiles"]):
            return False
        self.profile = number
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        bounds = self.engine.facts["profiles"][self.profile].get(name)
        self.shapes[name] = tuple(shape)
        if bounds is None:
            return False
        low, _, high = bounds
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known = self.shapes.get(name, self.engine.get_tensor_shape(name))
        return tuple(
            int(os.environ["FAKE_TRT_OUTPUT_TOKENS"]) if size == -1 else size for size in known
        )

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.profile is None or self.memory is None:
            return False
        if self.memory[1] < self.engine.get_device_memory_size_for_profile_v2(self.profile):
            return False
        if set(self.engine.facts["profiles"][self.profile]) - set(self.shapes):
            return False
        if stream in cudart.state.recording:
            cudart.state.recording[stream].append(self._compute)
        else:
            self._compute()
        return True

    def _compute(self) -> None:
        assert self.memory is not None
        cudart.memory(*self.memory)  # it must still be allocated
        feed = {
            name: self._view(name, self.shapes.get(name, node.shape)).copy()
            for name, node in self.engine.inputs.items()
        }
        outputs = self.engine.session.run(None, feed)
        for name, output in zip(self.engine.outputs, outputs, strict=True):
            self._view(name, output.shape)[...] = output

    def _view(self, name: str, shape: Any) -> Any:
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(cudart.memory(self.addresses[name], size), dtype).reshape(shape)
