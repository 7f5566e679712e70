"""Let torch's vector maths on the CPU settle before several threads use it.

torch on x86 computes sin, cos, exp and their like with Intel's VML, which looks up the kernel of each
function on its first call. If that first call runs on several threads at once, one of them may use a
kernel of low accuracy for its whole share, once (https://github.com/pytorch/pytorch/issues/188792,
MKL before 2025.0). A sinusoidal position table built at start-up then differs between two runs of the
same program in the 9th digit, and so does everything that is learned from it: a calibration that was
killed and resumed would not end with the schedule of one that was not.

One call of each function on one number, on one thread, is the cure.
"""

from __future__ import annotations

import functools

import torch

_FUNCTIONS = (
    "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "lgamma",
    "log", "log10", "log1p", "log2", "round", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip


@functools.cache
def settle_vector_math() -> None:
    """Call every vector function once on one thread; idempotent, takes about a millisecond.

    Call it before a model is built: its buffers may be the first to meet the race.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(one)
