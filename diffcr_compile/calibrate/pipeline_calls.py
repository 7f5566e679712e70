"""Run a pipeline of diffusers and watch the calls of its models."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcr_compile.blocks import get_leaf, map_leaves
from diffcr_compile.capture import TIMESTEP_NAMES
from diffcr_compile.errors import DiffCRError, UsageError
from diffcr_compile.program import batch_size
from diffcr_compile.signature import bind_call, split_leaves

Inputs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser, by parameter name, and the first tensor of its answer."""

    inputs: dict[str, Any]
    output: Tensor


@contextlib.contextmanager
def watching(
    modules: Mapping[str, nn.Module],
    batched_timestep: str | None,
    note: Callable[[str, DenoiserCall], None],
) -> Iterator[None]:
    """Call ``note(name, call)`` after each call of one of `modules`, with copies of its tensors."""
    under_way: dict[str, dict[str, Any]] = {}
    handles = []
    for name, module in modules.items():

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            # before the call, because a model may write into its inputs
            under_way[name] = _by_name(module, args, kwargs)

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            found = [
                t for t in pytree.tree_leaves(plain_output(output)) if isinstance(t, Tensor)
            ]
            if not found:
                return
            inputs = under_way.pop(name)
            if batched_timestep is not None:
                inputs[batched_timestep] = one_per_sample(inputs, batched_timestep)
            note(name, DenoiserCall(inputs, found[0].detach().clone()))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_pipeline(pipe: Any, inputs: Inputs, steps: int, seed: int) -> Any:
    """Call the pipeline, without its progress bar and, where it can, without decoding.

    Raises:
        UsageError: it fails; says what it takes.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    call = dict(inputs)
    optional = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    call.update({k: v for k, v in optional.items() if k in parameters and k not in call})
    bar = getattr(pipe, "_progress_bar_config", None)
    try:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(**{**(bar or {}), "disable": True})
        return pipe(**call)
    except DiffCRError:
        raise
    except Exception as error:
        names = [n for n in parameters if n not in ("self", "kwargs", "callback")]
        raise UsageError(
            f"{type(pipe).__name__} does not run on {sorted(inputs) or 'its defaults'}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. Pass pipeline_inputs= (on "
            "the command line --pipeline-inputs file.yaml, tensors in --inputs file.safetensors) with "
            f"what its call needs, such as prompt or prompt_embeds, height, width; it takes {names}"
        ) from error
    finally:
        if hasattr(pipe, "_progress_bar_config") or bar is not None:
            pipe._progress_bar_config = bar or {}


def timestep_name(inputs: Mapping[str, Any]) -> str | None:
    """Which of the inputs is the timestep; None if none is called like one."""
    return next(
        (n for n in inputs if n in TIMESTEP_NAMES and isinstance(inputs[n], Tensor)), None
    )


def _by_name(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    parameters, bound = bind_call(module, args, kwargs)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    copies: dict[str, Any] = map_leaves(
        bound, lambda _, t: t.detach().clone() if isinstance(t, Tensor) else t
    )
    return copies


def one_per_sample(inputs: Mapping[str, Any], timestep: str) -> Tensor:
    """The timestep with one value for each sample of the batch."""
    given: Tensor = inputs[timestep]
    tensors, _ = split_leaves(inputs)
    batch = batch_size({str(path): get_leaf(inputs, path) for path in tensors})
    if given.ndim > 0 and given.shape[0] == batch:
        return given
    if given.ndim > 0 and given.shape[0] != 1:
        return given
    rows = given.reshape(1, *given.shape[1:]) if given.ndim else given.reshape(1)
    return rows.expand(batch, *rows.shape[1:]).clone()


def plain_output(output: Any) -> Any:
    """The output as nested tuples."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output
