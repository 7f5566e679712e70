"""Copies of modules, also of those that hold on to something that cannot be copied."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T", nn.Module, nn.Parameter)
_STATE = ("_parameters", "_buffers", "_modules")
_HOLDERS = (list, tuple, dict, set, nn.Module)


def copied(value: T, memo: dict[int, Any] | None = None) -> T:
    """``copy.deepcopy``, in which attributes of modules that cannot be copied are shared with the original.

    Such are functions of TorchScript, locks and open files. Tensors that autograd computed, which users keep
    as caches, are copied without their history.

    Args:
        value: a module or a parameter.
        memo: id of something in it -> what stands in its place; of what is copied it will hold the copies, so that
            things shared by several values stay shared.

    Raises:
        Exception: as of ``copy.deepcopy``, if something else than an attribute cannot be copied.
    """
    memo = {} if memo is None else memo
    attempt = dict(memo)
    try:
        result = copy.deepcopy(value, attempt)
    except Exception:  # noqa: BLE001 - whatever a class raises that does not want to be copied
        # not the same memo: it holds half-made copies
        attempt = {**_stand_ins(value, memo), **memo}
        result = copy.deepcopy(value, attempt)
    # deepcopy keeps what it met alive under the id of its memo, which may soon be that of something else
    kept = attempt.pop(id(attempt), [])
    memo.update(attempt)
    memo.setdefault(id(memo), []).extend(kept)
    return result


def _stand_ins(value: nn.Module | nn.Parameter, memo: dict[int, Any]) -> dict[int, Any]:
    """Of each attribute of a module that cannot be copied: what is to be in its place."""
    parts = value.modules() if isinstance(value, nn.Module) else ()
    every = [held for part in parts for name, held in vars(part).items() if name not in _STATE]
    # What holds other things comes last: a list with a module in it (a way back to its parent, say) is copied once
    # it is known what stands in for the lock of that module.
    every.sort(key=lambda held: isinstance(held, _HOLDERS))
    found: dict[int, Any] = {}
    for held in every:
        try:
            copy.deepcopy(held, {**memo, **found})
        except Exception:  # noqa: BLE001 - as above
            found[id(held)] = held.detach().clone() if isinstance(held, Tensor) else held
    return found
