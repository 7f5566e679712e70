"""Is a captured graph the model? Both run on the example and on inputs that the capture has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from diffcr_compile.blocks import Path, map_leaves
from diffcr_compile.errors import CaptureError, one_line
from diffcr_compile.program import Program, flat_tensors, map_batched
from diffcr_compile.randomness import NOT_ONE_FUNCTION, differs_from_itself
from diffcr_compile.recorded import fresh
from diffcr_compile.signature import call_arguments
from diffcr_compile.verify import infer_shapes

# Captured graphs are equal to their model bit for bit, nearly always; a few fold a constant in another
# order (1e-7). A number that was baked in moves the output by 1e-2 and more.
MAX_CAPTURE_ERROR = 1e-4
_BAKED_IN = "a number that forward reads from its inputs was baked into the graph"


@torch.no_grad()
def check_capture(program: Program, model: nn.Module, bound: Mapping[str, Any]) -> None:
    """Compare the graph with the model, on the example and on inputs that the capture has not seen.

    A number that was baked into the graph shows on the unseen ones. They are legal for any model:
    the example's samples in another order, other noise, other timesteps.

    Raises:
        CaptureError: the outputs differ by more than rounding.
        UnsupportedModelError: sizes in the graph depend on the values of its inputs.
    """
    if any(t.is_meta or isinstance(t, FakeTensor) for t in program.example.values()):
        return  # nothing to compare: a dry run
    infer_shapes(program)
    trials = {"the example": dict(bound), "unseen inputs": _unseen(program, bound)}
    if program.dynamic_batch:  # a model may fix it without a word, and the exporter too
        trials["one more sample"] = _one_more(program, bound)
    for what, inputs in trials.items():
        try:
            expected = _call(model, program, inputs)
        except Exception as error:
            raise CaptureError(
                f"the model itself does not run on {what}: {one_line(error)}"
            ) from error
        try:
            found = _call(program.module, program, inputs)
        except Exception as error:
            raise CaptureError(
                f"on {what} the captured graph does not run: {one_line(error)}"
            ) from error
        if not all(bool(one.isfinite().all()) for one in expected):
            raise CaptureError(
                f"on {what} the model's own output holds NaN or infinite numbers, so that nothing can be compared "
                "with it: mend its weights or the example inputs"
            )
        if len(found) != len(expected):
            raise CaptureError(
                f"on {what} the graph returns {len(found)} tensors, the model {len(expected)}"
            )
        for one, two in zip(found, expected, strict=True):
            if one.shape != two.shape:
                raise CaptureError(
                    f"on {what} the graph returns {tuple(one.shape)}, the model {tuple(two.shape)}"
                )
            away = _relative_error(one, two)
            if not away <= MAX_CAPTURE_ERROR:
                call = call_arguments(program.signature.parameters, inputs)
                raise CaptureError(
                    f"on {what} the captured graph differs from the model by {away:.1e} (relative; "
                    f"allowed {MAX_CAPTURE_ERROR:.0e}): "
                    + (NOT_ONE_FUNCTION if differs_from_itself(model, *call) else _BAKED_IN)
                )


def _call(module: nn.Module, program: Program, bound: Mapping[str, Any]) -> list[Tensor]:
    args, kwargs = fresh(call_arguments(program.signature.parameters, bound))
    return flat_tensors(module(*args, **kwargs))


def _unseen(program: Program, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The example with its samples rolled by one, other noise and other timesteps.

    Fixed inputs stay as they are. Where their rows differ, the samples stay in their order: row and
    mask belong together.
    """
    generator = torch.Generator().manual_seed(7)
    names = {path: name for name, path in program.signature.inputs.items()}

    def change(path: Path, leaf: Any) -> Any:
        name = names.get(path)
        if name is None:
            return leaf
        if name == program.sample_input and leaf.is_floating_point():
            return leaf + torch.randn(leaf.shape, generator=generator).to(leaf)
        if name == program.timestep_input:
            return leaf // 2 if not leaf.is_floating_point() else leaf * 0.5
        return leaf

    fixed = [leaf for leaf in program.fixed_inputs.values() if leaf.ndim > 0]
    if all(torch.equal(leaf.roll(1, 0), leaf) for leaf in fixed):
        bound = map_batched(dict(bound), program.batch, lambda tensor: tensor.roll(1, 0))
    changed: dict[str, Any] = map_leaves(dict(bound), change)
    return changed


def _one_more(program: Program, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The example with its first sample once more at the end."""
    longer: dict[str, Any] = map_batched(
        dict(bound), program.batch, lambda tensor: torch.cat([tensor, tensor[:1]])
    )
    return longer


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if torch.equal(found, expected):
        return 0.0
    if not found.is_floating_point():
        return float("inf")
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((found - expected).abs().max() / scale).item())
