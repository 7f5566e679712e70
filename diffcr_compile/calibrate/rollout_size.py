"""What teacher states will take on disk and in memory, told before the first of them is made."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffcr_compile.calibrate.data import batched_inputs
from diffcr_compile.config import RolloutConfig
from diffcr_compile.errors import ResourceError
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.program import Program, run_flat

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class StatesSize:
    """The size of all states of a set of rollouts or pipeline runs.

    Attributes:
        count: trajectories, or runs of a pipeline.
        bytes_each: of one of them.
    """

    count: int
    bytes_each: int

    @property
    def disk_bytes(self) -> int:
        """What the files hold, without their headers."""
        return self.count * self.bytes_each

    @property
    def memory_bytes(self) -> int:
        """At the most: the shards, and all of them joined."""
        return 2 * self.disk_bytes

    def check(self, max_gib: float, setting: str, folder: Path | None) -> None:
        """Refuse what is not allowed or does not fit.

        Args:
            max_gib: largest size that the settings allow.
            setting: that `count` comes from, for the message.
            folder: where the states will be kept; None for memory only.

        Raises:
            ResourceError: too large for `max_gib`, or for the disk.
        """
        needed = self.disk_bytes / GIB
        if needed > max_gib:
            raise ResourceError(
                f"{setting} = {self.count} would take {needed:.2f} GiB of states, rollouts.max_gib allows "
                f"{max_gib:g}. Set {setting} to at most {int(max_gib * GIB // self.bytes_each)}, or "
                "allow more.",
                code="DCR-R011",
            )
        if folder is None:
            return
        kept = sum(path.stat().st_size for path in folder.glob("rollouts_*.safetensors"))
        free = shutil.disk_usage(folder).free
        if self.disk_bytes - kept > free:
            raise ResourceError(
                f"the states take {needed:.2f} GiB on disk and {folder} has {free / GIB:.2f} GiB left. "
                f"Free some, or lower {setting} = {self.count}.",
                code="DCR-R011",
            )


def rollout_size(program: Program, config: RolloutConfig, steps: int) -> StatesSize:
    """Of plain rollouts.

    Args:
        program: CAPTURED or ROUTED.
        config: how many trajectories.
        steps: sampling steps of each.
    """
    batched = batched_inputs(program)
    row = {name: t for name, t in program.example.items() if name in batched}
    row.pop(program.timestep_input or "", None)  # one number, kept by itself
    each = [*row.values(), _answer(program)]
    bytes_per_state = sum(_bytes(t) // program.batch for t in each) + torch.float32.itemsize
    # inputs without a batch axis stand once in each shard
    once = sum(_bytes(t) for name, t in program.example.items() if name not in batched)
    return StatesSize(config.trajectories, steps * bytes_per_state + -(-once // config.batch))


def _answer(program: Program) -> Tensor:
    """The first output as a tensor without memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with kept_caches(program.module), mode, torch.no_grad():
        inputs = {name: mode.from_tensor(t) for name, t in program.example.items()}
        return run_flat(program, inputs)[0]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
