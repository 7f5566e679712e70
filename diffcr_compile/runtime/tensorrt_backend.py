"""Engines of TensorRT: a context per set of lengths over shared buffers, recorded as CUDA graphs where possible."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.engine_plan import Place
from diffcr_compile.errors import ArtifactError, ResourceError
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.complex_inputs import GraphTensor, as_graph_tensor, tensor_words
from diffcr_compile.runtime.cuda_api import Cuda
from diffcr_compile.runtime.device_buffers import tensor_bytes
from diffcr_compile.runtime.engine_files import Sidecar, plan_file, read_plan, rebuild
from diffcr_compile.runtime.loaded_engines import LoadedEngines, ReadyContext

Array = npt.NDArray[Any]


class TensorRTBackend:
    """Runs timestep buckets on the engines of one folder.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        folder: of the engines.
        sidecar: of them; the caller has checked that they may run here.
        trt: TensorRT's Python module.
        cuda: the device.
        swap: keep only the engine and the context of the current bucket in memory. Changing the bucket
            then reads a plan from disk.
        cuda_graphs: record each context's work once and replay it, which spares launches.
        verify: compare the hash of a plan with the sidecar whenever it is read.

    Raises:
        ArtifactError: a plan is not the one that its sidecar describes, TensorRT cannot read it, or it has
            other inputs or outputs.
        ResourceError: the device has too little memory.

    Attributes:
        sidecar: of the engines.
        remarks: what was not done as asked, such as a graph that CUDA could not record, in words.
    """

    def __init__(
        self,
        artifact: Path,
        manifest: Manifest,
        folder: Path,
        sidecar: Sidecar,
        trt: Any,
        cuda: Cuda,
        *,
        swap: bool = False,
        cuda_graphs: bool = True,
        verify: bool = True,
    ) -> None:
        self._artifact, self._manifest = artifact, manifest
        self._folder, self.sidecar = folder, sidecar
        self._trt, self._cuda = trt, cuda
        self._swap, self._cuda_graphs, self._verify = swap, cuda_graphs, verify
        self._lock = threading.Lock()
        self.remarks: list[str] = []
        self._check_memory()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._loaded = LoadedEngines(cuda, self._runtime)
        # a backend that nobody closes gives its memory back when it goes; at the end of the process CUDA does it
        self._free = weakref.finalize(self, self._loaded.close)
        self._free.atexit = False
        try:
            self._loaded.buffers.reserve(self._tensor_sizes())
            self._fill_length_inputs()
            if not swap:
                self._load_all()
        except BaseException:
            self.close()
            raise

    def run(self, bucket: int, arrays: Mapping[str, Array]) -> list[Array]:
        """Outputs of a timestep bucket, in the order of the manifest.

        Args:
            bucket: its index.
            arrays: as the manifest says, complex ones as real pairs.
        """
        with self._lock:
            self._check_open()
            context = self._context(bucket)
            for name, array in arrays.items():
                self._cuda.upload(
                    self._loaded.buffers.addresses[name],
                    np.ascontiguousarray(array),
                    self._loaded.cuda_stream,
                )
            self._execute(context, bucket)
            outputs = [np.empty(s["shape"], s["dtype"]) for s in self._manifest.outputs]
            for spec, output in zip(self._manifest.outputs, outputs, strict=True):
                self._cuda.download(
                    output,
                    self._loaded.buffers.addresses[spec["name"]],
                    self._loaded.cuda_stream,
                )
            self._cuda.synchronize(self._loaded.cuda_stream)
            return outputs

    def layer_information(self, engine: str) -> str:
        """What TensorRT says about the layers of an engine, as JSON."""
        with self._lock:
            self._check_open()
            inspector = self._engine(engine).create_engine_inspector()
            form = self._trt.LayerInformationFormat.JSON
            return str(inspector.get_engine_information(form))

    def close(self) -> None:
        """Give all memory of the device back, after a run that is under way; further runs are refused."""
        with self._lock:
            self._free()  # does nothing the second time

    def _check_open(self) -> None:
        """Raise ResourceError if the memory was given back."""
        if not self._free.alive:
            raise ResourceError("this runner was closed; load the artifact again")

    # ------------------------------------------------------------------------------- loading

    def _load_all(self) -> None:
        """Every engine and context, over one activation buffer as large as the largest needs."""
        plan = self.sidecar.plan
        sizes = [
            self._activation_bytes(self._engine(engine.name), number)
            for engine in plan.engines
            for number in range(len(engine.profiles))
        ]
        self._loaded.activations.reserve(max(sizes))
        for bucket in range(len(self._manifest.buckets)):
            self._context(bucket)

    def _context(self, bucket: int) -> ReadyContext:
        """The context of a bucket, made at its first use; with `swap` all others are dropped."""
        place = self.sidecar.plan.place(bucket)
        key = (place.engine.name, place.profile, place.entry)
        if key not in self._loaded.contexts:
            if self._swap:
                self._loaded.drop_contexts()
                for name in [
                    name for name in self._loaded.engines if name != place.engine.name
                ]:
                    del self._loaded.engines[name]
            self._loaded.contexts[key] = ReadyContext(self._make_context(place))
        return self._loaded.contexts[key]

    def _engine(self, name: str) -> Any:
        if name not in self._loaded.engines:
            path = self._folder / plan_file(name)
            data = read_plan(self._folder, self.sidecar, name, self._verify)
            engine = self._runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise ArtifactError(
                    f"TensorRT {self._trt.__version__} cannot read {path}, although it is the file that "
                    f"was built here: the device is out of memory, or JetPack was changed. "
                    f"{rebuild(self._artifact)}",
                    code="DCR-A011",
                )
            self._check_tensors(path, engine)
            self._loaded.engines[name] = engine
        return self._loaded.engines[name]

    def _make_context(self, place: Place) -> Any:
        spec, number, shapes = place.engine, place.profile, place.shapes
        engine = self._engine(spec.name)
        context = engine.create_execution_context(self._context_settings(engine, bool(shapes)))
        if context is None:
            raise ResourceError(
                f"TensorRT could not make a context for profile {number} of {spec.name}: memory. Load "
                "with swap=True, or free memory on the device.",
                code="DCR-R003",
            )
        done = bool(context.set_optimization_profile_async(number, self._loaded.cuda_stream))
        self._cuda.synchronize(self._loaded.cuda_stream)
        for name, shape in shapes.items():
            done = done and bool(context.set_input_shape(name, shape))
        done = done and self._gives_outputs(context)
        size = self._activation_bytes(engine, number)
        context.set_device_memory(self._loaded.activations.reserve(size), size)
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            done = done and bool(
                context.set_tensor_address(name, self._loaded.buffers.addresses[name])
            )
        if not done:
            raise ArtifactError(
                f"profile {number} of {spec.name} does not take the shapes that its sidecar names, or gives "
                "outputs of other shapes than the manifest: "
                f"{ {n: tuple(s) for n, s in shapes.items()} }. {rebuild(self._artifact)}",
                code="DCR-A011",
            )
        return context

    def _gives_outputs(self, context: Any) -> bool:
        """Whether a context, which knows every length, gives outputs that fill their buffers."""
        return all(
            tuple(context.get_tensor_shape(row["name"])) == as_graph_tensor(row)[0]
            for row in self._manifest.outputs
        )

    def _context_settings(self, engine: Any, open_lengths: bool) -> Any:
        """The scratch memory is ours; TensorRT-RTX specialises kernels for open lengths before the first run.

        By itself it runs general kernels until the special ones are made in the background, and a CUDA graph
        recorded meanwhile would keep the general ones.
        """
        ours = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        when = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if when is None or not open_lengths:
            return ours
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(ours)
        settings.dynamic_shapes_kernel_specialization_strategy = when.EAGER
        return settings

    def _activation_bytes(self, engine: Any, profile: int) -> int:
        return int(engine.get_device_memory_size_for_profile_v2(profile))

    # ------------------------------------------------------------------------------- running

    def _execute(self, context: ReadyContext, bucket: int) -> None:
        if context.graph is not None:
            self._cuda.launch(context.graph, self._loaded.cuda_stream)
            return
        # TensorRT sets things up in the first run after a change of shapes, which cannot be recorded.
        if self._cuda_graphs and context.runs == 1:
            context.graph = self._record(context.context, bucket)
        context.runs += 1
        if context.graph is not None:
            self._cuda.launch(context.graph, self._loaded.cuda_stream)
        else:
            self._enqueue(context.context, bucket)

    def _record(self, context: Any, bucket: int) -> Any:
        """The work of a context as a CUDA graph; None, and a remark, if it cannot be recorded."""
        self._cuda.synchronize(self._loaded.cuda_stream)
        try:
            self._cuda.begin_capture(self._loaded.cuda_stream)
            try:
                self._enqueue(context, bucket)
            finally:
                graph = self._cuda.end_capture(self._loaded.cuda_stream)
        except ResourceError as error:
            self.remarks.append(
                f"timestep bucket {bucket} runs without a CUDA graph: {error.message}"
            )
            return None
        return graph

    def _enqueue(self, context: Any, bucket: int) -> None:
        if not context.execute_async_v3(self._loaded.cuda_stream):
            raise ResourceError(
                f"TensorRT could not run timestep bucket {bucket}; its log has the reason. Start the "
                "process again; if it comes back, run diffcr doctor --device.",
                code="DCR-R004",
            )

    # ------------------------------------------------------------------------------- checks

    def _tensor_sizes(self) -> dict[str, int]:
        """Bytes of every input and output; of inputs that are lengths, of the longest."""
        specs = (*self._manifest.inputs, *self._manifest.outputs)
        sizes = {spec["name"]: tensor_bytes(spec["shape"], spec["dtype"]) for spec in specs}
        return sizes | self._length_inputs()

    def _length_inputs(self) -> dict[str, int]:
        """Inputs that say a length and whose values nobody reads -> bytes, at 8 per element."""
        sizes: dict[str, int] = {}
        for engine in self.sidecar.plan.engines:
            for bounds in engine.bounds():
                for name, (_, _, longest) in bounds.items():
                    sizes[name] = max(sizes.get(name, 0), 8 * int(np.prod(longest)))
        return sizes

    def _fill_length_inputs(self) -> None:
        for name, size in self._length_inputs().items():
            zeros = np.zeros(size, np.uint8)
            self._cuda.upload(
                self._loaded.buffers.addresses[name], zeros, self._loaded.cuda_stream
            )
        self._cuda.synchronize(self._loaded.cuda_stream)

    def _check_tensors(self, path: Path, engine: Any) -> None:
        """Raise ArtifactError unless the engine's inputs and outputs are the artifact's, and fill their buffers.

        An input that no node reads may be missing; an output may not, its buffer would keep what was there.
        Behind an open length a size may be open too, until a context knows the length.
        """
        specs = (*self._manifest.inputs, *self._manifest.outputs)
        wanted = {spec["name"]: as_graph_tensor(spec) for spec in specs}
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        lengths = self._length_inputs()
        found = {name: self._tensor(engine, name) for name in names if name not in lengths}
        may_be_open = any(name in lengths for name in names)
        outputs = {spec["name"] for spec in self._manifest.outputs}
        for name in sorted(found.keys() | outputs):
            if not _fits(found.get(name), wanted.get(name), may_be_open):
                raise ArtifactError(
                    f"{path} has as {name} {tensor_words(found.get(name))}, the artifact "
                    f"{tensor_words(wanted.get(name))}. {rebuild(self._artifact)}",
                    code="DCR-A012",
                )

    def _tensor(self, engine: Any, name: str) -> GraphTensor:
        """Shape and type of an engine's tensor; an open length is -1."""
        dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))).name
        return tuple(engine.get_tensor_shape(name)), dtype

    def _check_memory(self) -> None:
        """Raise ResourceError if the plans alone are larger than what is free."""
        sizes = [file.bytes for file in self.sidecar.files.values()]
        needed = max(sizes) if self._swap else sum(sizes)
        free = self._cuda.free_bytes()
        if needed > free:
            advice = (
                "Free memory on the device."
                if self._swap
                else "Load with swap=True, which keeps one engine at a time, or free memory."
            )
            raise ResourceError(
                f"the engines need more than {needed / 1e6:.0f} MB of the device's memory, "
                f"{free / 1e6:.0f} MB are free. {advice}",
                code="DCR-R003",
            )


def _fits(found: GraphTensor | None, wanted: GraphTensor | None, may_be_open: bool) -> bool:
    """Whether a tensor of an engine is the one of the manifest."""
    if found is None or wanted is None or found[1] != wanted[1]:
        return False
    sizes = [
        w if f == -1 and may_be_open else f for f, w in zip(found[0], wanted[0], strict=False)
    ]
    return len(found[0]) == len(wanted[0]) and tuple(sizes) == wanted[0]
