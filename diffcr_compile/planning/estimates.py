"""Memory and disk that a compilation will take, from sizes alone.

The formulas follow what the stages allocate and write; each is said beside its line. They hold for
models of some size: below about 100 MB the fixed costs of Python, torch and JSON files dominate.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from diffcr_compile.config import CompileConfig

Train = Literal["ratio", "router", "lora", "all"]

# Measured on the reference DiT with the pinned versions: a process with torch loaded, and one ONNX
# graph of 8 blocks without its weights.
RUNTIME_BYTES = 450_000_000
GRAPH_BYTES_PER_BLOCK = 6_500
# Weights, their moving average and AdamW's two moments.
STATE_COPIES = 4


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, in bytes unless said otherwise.

    Attributes:
        weights: parameters and buffers.
        routing: weights of all routers and shortcuts.
        width: mean channels of the routed streams.
        blocks: number of blocks that stand in the graph as such.
        inputs: the example inputs, whole batch.
        inputs_per_sample: inputs of one sample.
        outputs_per_sample: outputs of one sample.
        forward: all tensors that one forward of one sample makes.
        batch: samples in the example.
    """

    weights: int
    routing: int
    width: int
    blocks: int
    inputs: int
    inputs_per_sample: int
    outputs_per_sample: int
    forward: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Bytes of memory and disk.

    Attributes:
        weights: parameters and buffers of the dense model.
        calibrate: peak memory of the calibration as configured; an upper bound for activations.
        calibrate_routers: the same if only routers and ratios are trained.
        rollouts: teacher states, on disk and in memory.
        artifact: what is shipped: ONNX graphs, weights and golden files.
        folder: what lies in the output folder at the end.
        disk_peak: largest size of the output folder on the way.
        engine_build: peak memory of an engine build on the target; None where nothing is built.
        engines: memory of the weights of one static engine per timestep bucket; None as before.
    """

    weights: int
    calibrate: int
    calibrate_routers: int
    rollouts: int
    artifact: int
    folder: int
    disk_peak: int
    engine_build: int | None
    engines: int | None


def estimate(
    sizes: ModelSizes, config: CompileConfig, build_memory: float | None
) -> Estimates:
    """What ``diffcr compile`` takes with these settings.

    Args:
        sizes: of the model.
        config: of the compilation.
        build_memory: peak memory of an engine build / bytes of weights.
    """
    train = config.calibration.train
    buckets = config.routing.buckets
    rollouts = config.rollouts
    states = rollouts.trajectories * rollouts.steps
    teacher = states * (sizes.inputs_per_sample + sizes.outputs_per_sample)
    batch = config.export.batch or sizes.batch
    golden = buckets * batch * (sizes.inputs_per_sample + sizes.outputs_per_sample)
    trained = _trained(sizes, config, train)
    # model/routed.safetensors: what differs from the user's model; adapters are merged by then
    learned = sizes.routing + (sizes.weights if train in ("lora", "all") else 0)
    graphs = (
        (buckets + 1) * sizes.blocks * GRAPH_BYTES_PER_BLOCK
    )  # one more: the dense baseline
    artifact = sizes.weights + sizes.routing + graphs + golden
    state = STATE_COPIES * trained
    # calibration/state, rollouts, model/routed.safetensors, baseline/dense.onnx
    folder = artifact + state + teacher + learned + sizes.weights
    return Estimates(
        weights=sizes.weights,
        calibrate=_calibrate(sizes, config, train) + teacher,
        calibrate_routers=_calibrate(sizes, config, "router") + teacher,
        rollouts=teacher,
        artifact=artifact,
        folder=folder,
        disk_peak=folder
        + state,  # the new state is written whole before it replaces the old one
        engine_build=None if build_memory is None else round(build_memory * sizes.weights),
        engines=None if build_memory is None else buckets * sizes.weights,
    )


def _calibrate(sizes: ModelSizes, config: CompileConfig, train: Train) -> int:
    trained = _trained(sizes, config, train)
    # the user's model, and with adapters the weights that they are merged into; of what is trained: a copy, gradients, moving average, two moments; and the
    # copies of all but the gradients that are made to save the state
    weights = sizes.weights * (2 if train == "lora" else 1)
    tensors = weights + 5 * trained + STATE_COPIES * trained
    activations = config.calibration.batch * sizes.forward
    # At the warm start there is none of the training yet, but a float64 matrix per block, two while shortcuts are fitted.
    matrices = 2 if config.routing.shortcut_rank else 1
    fits = sizes.blocks * matrices * 8 * sizes.width**2
    return RUNTIME_BYTES + max(
        tensors + activations, sizes.weights + 2 * trained + fits + sizes.forward
    )


def _trained(sizes: ModelSizes, config: CompileConfig, train: Train) -> int:
    """Bytes of what has gradients; of adapters an upper bound."""
    if train == "all":
        return sizes.routing + sizes.weights
    if train != "lora":
        return sizes.routing
    # A layer of a by b weights gets rank * (a + b) more, and neither is smaller than the stream.
    return sizes.routing + round(
        sizes.weights * min(1.0, 2 * config.calibration.lora_rank / max(sizes.width, 1))
    )
