"""Every executor's answers against float32 in eager mode, on the GPU and, for small models, on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.models import Routed, frozen, on_cpu
from diffcr_compile.export.parity import compare
from diffcr_compile.program import Program, run_flat

# Relative L2. Float16 rounds each number by up to 5e-4 of it; products of hundreds to thousands of terms
# through 6 to 8 blocks, with the stream itself in float16 in torch, end near 1e-3. Kept tokens are the same
# by construction, see models.py; with other ones the difference is 0.1 and more.
HALF_TOLERANCE = 5e-3
# Float32 on two devices: the order of sums.
WIDE_TOLERANCE = 1e-4

# Largest tokens x width of a model that is run on the CPU too. Larger ones take a CPU some twenty seconds, of a GPU's
# time that is mostly lent; that float32 on the device is float32 the small ones show.
CPU_SIZE = 1024 * 384

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class References:
    """Float32 answers in eager mode.

    Attributes:
        dense: of the dense model on the device.
        device: of the compressed model on the device.
        cpu: of the compressed model on the CPU; none of a large model.
    """

    dense: Arrays
    device: Arrays
    cpu: Arrays


def references(
    routed: Routed, keep_ratio: float, path: Path, *, on_cpu_too: bool
) -> References:
    """The answers, computed once for all executors and kept in `path`."""
    if not path.exists():
        compressed = frozen(routed.wide, keep_ratio)
        made = {
            "dense": answers(frozen(routed.wide, 1.0)),
            "device": answers(compressed),
            "cpu": answers(on_cpu(compressed)) if on_cpu_too else [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = {f"{n}.{i}": a for n, arrays in made.items() for i, a in enumerate(arrays)}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **flat)
        partial.replace(path)
    with np.load(path) as stored:
        named = {
            name: [stored[k] for k in stored.files if k.startswith(f"{name}.")]
            for name in ("dense", "device", "cpu")
        }
    return References(**named)


@torch.no_grad()
def answers(program: Program) -> Arrays:
    """A program's outputs on its example."""
    return to_arrays(run_flat(program, program.example))


def to_arrays(outputs: Sequence[Any]) -> Arrays:
    """Tensors or arrays as float32 arrays."""
    return [
        np.asarray(o.detach().float().cpu() if isinstance(o, torch.Tensor) else o, np.float32)
        for o in outputs
    ]


def parity_rows(dense: Arrays, compressed: Arrays, of: References) -> list[dict[str, Any]]:
    """How far an executor is from float32 in eager mode, and float32 on the device from the CPU where that ran."""
    rows = [
        ("dense -> float32, eager, device", dense, of.dense, HALF_TOLERANCE),
        ("compressed -> float32, eager, device", compressed, of.device, HALF_TOLERANCE),
    ]
    if of.cpu:
        rows += [
            ("compressed -> float32, eager, CPU", compressed, of.cpu, HALF_TOLERANCE),
            ("float32, eager: device -> CPU", of.device, of.cpu, WIDE_TOLERANCE),
        ]
    return [
        dataclasses.asdict(compare(step, found, expected, allowed, measure="rel_l2"))
        for step, found, expected, allowed in rows
    ]
