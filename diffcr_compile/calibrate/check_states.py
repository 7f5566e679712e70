"""Teacher states that do not fit the model are refused before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.errors import UsageError
from diffcr_compile.program import Program, evaluating, run_flat


def check_states(program: Program, states: TeacherStates) -> None:
    """Names, shapes and numbers of the inputs and the answers.

    Raises:
        UsageError: says which input, what was found and what is expected.
    """
    count = len(states)
    if count == 0:
        raise _wrong("there are none; give at least one per timestep bucket")
    if set(states.inputs) != set(program.example):
        raise _wrong(
            f"their inputs are {sorted(states.inputs)}, the model's {sorted(program.example)}"
        )
    batched = batched_inputs(program)
    for name, tensor in states.inputs.items():
        want = program.example[name].shape
        _check_shape(name, tensor, (count, *want[1:]) if name in batched else tuple(want))
    if states.timesteps.ndim != 1:
        raise _wrong(
            f"timesteps have shape {tuple(states.timesteps.shape)}, expected ({count},)"
        )
    _check_shape("target", states.target, (count, *_answer_shape(program)))
    for name, tensor in {**states.inputs, "timesteps": states.timesteps}.items():
        if not _finite(tensor):
            raise _wrong(f"{name} holds NaN or infinity")
    if not _finite(states.target):
        raise _wrong(
            "the dense model's answers hold NaN or infinity. It overflows on these inputs: check them, "
            "and run a half-precision model in bf16 or fp32"
        )


@torch.no_grad()
def _answer_shape(program: Program) -> tuple[int, ...]:
    """Of what the model answers for one sample."""
    with evaluating(program.module):
        return tuple(run_flat(program, program.example)[0].shape[1:])


def _check_shape(name: str, tensor: Tensor, want: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != want:
        raise _wrong(f"{name} has shape {tuple(tensor.shape)}, expected {want}")


def _finite(tensor: Tensor) -> bool:
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return not numbers or bool(tensor.isfinite().all())


def _wrong(what: str) -> UsageError:
    return UsageError(f"the training states do not fit the model: {what}.", code="DCR-U072")
