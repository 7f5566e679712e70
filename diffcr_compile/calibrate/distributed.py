"""Several processes that calibrate one model together: each takes its share of every batch.

Plain torch.distributed around the one loop, nothing else: all processes (*ranks*) hold the whole model
and draw the same batch from (seed, step); each works on every count-th state of it and weighs its loss
by its share. Summed over the ranks, losses and gradients are then those of one process with the whole
batch, for any batch and any number of ranks, and every rank takes the same step.

Losses go over a gloo group of their own, also where gradients go over NCCL: a rank that is gone is
noticed there, with an error and within a time limit, before anybody waits for it on a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffcr_compile.calibrate.sharded_tensors import is_sharded
from diffcr_compile.errors import EnvironmentMissingError, UsageError

BUCKET_BYTES = 32 * 2**20  # gradients that are sent together
PATIENCE = datetime.timedelta(days=7)  # for what rank 0 does alone, after the calibration


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that calibrate together; one alone unless :func:`joined_ranks` says otherwise.

    Attributes:
        rank: of this process, from 0. Rank 0 leads: it writes files.
        count: how many there are.
        control: gloo group for small things.
        patient: gloo group whose time limit is days.
    """

    rank: int = 0
    count: int = 1
    control: Any = None
    patient: Any = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> tuple[Tensor, float]:
        """This rank's part of a batch, and its weight: the parts' means, weighted, are the whole mean."""
        mine = rows[self.rank :: self.count]
        return mine, len(mine) / len(rows)

    def total(self, value: float) -> float:
        """The sum of every rank's `value`, the same on all of them."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        with _everybody_there():
            dist.all_reduce(tensor, group=self.control)
        return float(tensor)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over the ranks.

        Which parameters have one must not differ between ranks; with one graph it cannot. Of sharded parameters it is the
        mean already, every rank having its share.
        """
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        shares = [gradient for gradient in gradients if is_sharded(gradient)]
        if shares:
            torch._foreach_mul_(shares, self.count)
        for part in _in_buckets([g for g in gradients if not is_sharded(g)]):
            flat = torch.cat([gradient.flatten() for gradient in part])
            with _everybody_there():
                # on a device over the default group, which is NCCL there
                dist.all_reduce(flat, group=self.control if flat.is_cpu else None)
            pieces = torch.split(flat, [gradient.numel() for gradient in part])
            for gradient, piece in zip(part, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def from_leader(
        self,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        keep: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Rank 0's tensors (on the CPU) and JSON-able facts, on every rank.

        Args:
            tensors: rank 0's; those of the others do not count.
            facts: the same.
            keep: what a rank keeps of a tensor, by its name; called as soon as it is there, so that few are whole at a time.
        """
        if self.count == 1:
            return dict(tensors), dict(facts)
        form = {n: [str(t.dtype), list(t.shape)] for n, t in tensors.items()}
        with _everybody_there():
            form, facts = self._json_from_leader([form, dict(facts)])
            found = {}
            for name, (dtype, shape) in form.items():
                if self.leads:
                    tensor = tensors[name].detach().cpu().contiguous()
                else:
                    kind = getattr(torch, dtype.removeprefix("torch."))
                    tensor = torch.empty(shape, dtype=kind)
                dist.broadcast(tensor, 0, group=self.control)
                found[name] = keep(name, tensor)
        return found, dict(facts)

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Whatever is done in here waits for other ranks: an error may come from one that is gone, and then says so."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # ours, and the others are not here to be asked
        except RuntimeError:
            self.wait()
            raise

    def wait(self) -> None:
        """Until every rank is here."""
        self.total(0.0)

    def wait_for_leader(self) -> None:
        """Until rank 0 calls this too, however long that takes; an error if it ends before."""
        if self.count > 1:
            with _everybody_there():
                dist.all_reduce(torch.zeros(1), group=self.patient)

    def check_same(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Refuse to go on with tensors that differ between ranks.

        Args:
            what: they are, for the message.
            tensors: compared by sums over their bits, which no order and no device changes.

        Raises:
            UsageError: they differ.
        """
        if self.count == 1:
            return
        mine = torch.tensor([sum(bit_sum(tensor) for tensor in tensors) % 2**62])
        with _everybody_there():
            every = [torch.empty_like(mine) for _ in range(self.count)]
            dist.all_gather(every, mine, group=self.control)
        other = [rank for rank, found in enumerate(every) if not torch.equal(found, every[0])]
        if other:
            raise UsageError(
                f"{what} of rank {', '.join(map(str, other))} differ from those of rank 0. Ranks that "
                "calibrate together start from the same model and data: load or seed them alike.",
                code="DCR-U070",
            )

    def _json_from_leader(self, value: Any) -> Any:
        text = json.dumps(value).encode() if self.leads else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0, group=self.control)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.leads:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self.control)
        return json.loads(bytes(data.tolist()))


@contextlib.contextmanager
def joined_ranks(seconds: float) -> Iterator[Ranks]:
    """The ranks that this process is one of: those of torch.distributed, or those that torchrun started.

    Args:
        seconds: that a rank waits for the others before it gives up.
    """
    started = False
    limit = datetime.timedelta(seconds=seconds)
    if not dist.is_available() or (not dist.is_initialized() and not _launched()):
        yield Ranks()
        return
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(kind, timeout=limit)
        started = True
    try:
        with _everybody_there():
            control = dist.new_group(backend="gloo", timeout=limit)
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), control, patient)
    finally:
        if started:
            dist.destroy_process_group()


def _launched() -> bool:
    """Whether torchrun, or something that sets what it sets, started this process beside others."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def _everybody_there() -> Iterator[None]:
    """What goes wrong in here is a rank that does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0].removesuffix("GLHF! 🏖️").strip()
        raise EnvironmentMissingError(
            f"another rank of this calibration does not answer ({reason}). It has ended, or its machine "
            "cannot be reached; its own output says why. Start all ranks again with the same "
            "settings: they go on from the last saved state.",
            code="DCR-E010",
        ) from error


def _in_buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device each, of at most BUCKET_BYTES together if they are many."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        part: list[Tensor] = []
        for tensor in alike:
            part.append(tensor)
            if sum(t.numel() * t.element_size() for t in part) >= BUCKET_BYTES:
                yield part
                part = []
        if part:
            yield part


def bit_sum(tensor: Tensor) -> int:
    """The sum of a tensor's elements, their bits read as integers: exact in any order."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(sizes.get(tensor.element_size(), torch.int64)).sum(dtype=torch.int64))
