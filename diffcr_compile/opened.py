"""What the caller gave: a model or a pipeline, example inputs, and their fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcr_compile.calibrate.pipeline_calls import Inputs
from diffcr_compile.calibrate.pipelines import (
    FEW_STEPS,
    PipelineRuns,
    is_pipeline,
    open_pipeline,
)
from diffcr_compile.errors import UsageError
from diffcr_compile.tensor_bytes import tensor_bytes

ExampleInputs = Mapping[str, Any] | Sequence[Any] | Tensor
PipelineInputs = Inputs | Sequence[Inputs] | None


def open_model(
    model: nn.Module | Any,
    example_inputs: ExampleInputs | None,
    pipeline_inputs: PipelineInputs,
    component: str | None,
    steps: int = FEW_STEPS,
) -> tuple[nn.Module, ExampleInputs, PipelineRuns | None]:
    """The model and its example inputs; of a pipeline its denoiser, and what it was called with."""
    if isinstance(model, PipelineRuns):
        return model.model, model.example, model
    if is_pipeline(model):
        if example_inputs is not None:
            raise UsageError(
                "a pipeline's example inputs are recorded; pass pipeline_inputs= instead of them",
                code="DCR-U026",
            )
        runs = open_pipeline(model, pipeline_inputs, component, steps)
        return runs.model, runs.example, runs
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"expected a torch.nn.Module or a pipeline of diffusers, got {type(model).__name__}",
            code="DCR-U026",
        )
    if example_inputs is None or pipeline_inputs is not None or component is not None:
        raise UsageError(
            f"{type(model).__name__} is a model: it needs example_inputs=; pipeline_inputs= and "
            "component= are for pipelines",
            code="DCR-U026",
        )
    return model, example_inputs, None


def call_of(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


def call_batch(example_inputs: ExampleInputs) -> int:
    """Batch size of a call: axis 0 of its tensor with the most axes; 1 where no tensor has an axis."""
    tensors = [t for t in pytree.tree_leaves(call_of(example_inputs)) if isinstance(t, Tensor)]
    if not tensors:
        raise UsageError(
            "the example inputs hold no tensor; give those that forward is called with",
            code="DCR-U026",
        )
    largest = max(tensors, key=lambda t: t.ndim)
    return largest.shape[0] if largest.ndim else 1


def shapes(example_inputs: ExampleInputs) -> Any:
    args, kwargs = call_of(example_inputs)

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), list(value.shape)]
        if isinstance(value, Mapping):
            return {key: shape(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [shape(item) for item in value]
        return repr(value)

    return [shape(args), shape(kwargs)]


def weights_hash(model: nn.Module, counts: Callable[[str], bool] = lambda _: True) -> str:
    """sha256 over parameters and buffers, those whose names count."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if counts(name):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
