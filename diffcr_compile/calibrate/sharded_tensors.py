"""Tensors of which every rank holds a share (DTensors, split along axis 0), beside whole ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a share of the tensor only: a DTensor, whose class takes long to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shares. All ranks call this for the same tensors in the same order."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def share_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, as `other` has it: on its device, and this rank's share if it is sharded."""
    if is_sharded(tensor) or not is_sharded(other):
        return tensor.to(other.device)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(
        tensor.to(other.device), mesh, [Replicate()], run_check=False
    )
    return everywhere.redistribute(mesh, placements)


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Whole tensors, and sharded ones, each kind if there is any: operations over many tensors take one kind at a time."""
    every = list(tensors)
    kinds = [[t for t in every if is_sharded(t) == kind] for kind in (False, True)]
    return [kind for kind in kinds if kind]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, whole ones and sharded ones."""
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in alike(tensors)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
