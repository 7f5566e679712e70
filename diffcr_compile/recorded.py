"""Run a model and record what its blocks are given and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffcr_compile.blocks import leaves, map_leaves
from diffcr_compile.data_dependent import DATA_DEPENDENT, needs_values
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.program import map_batched

# (name of a block, its (args, kwargs), its output) -> what it returns instead
Edit = Callable[[str, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One recorded call of a block: ``tree`` is (args, kwargs)."""

    tree: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any


class IllegalError(Exception):
    """Why a candidate may not be routed."""


def run_recorded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    edit: Edit | None,
) -> tuple[dict[str, list[Call]], Any]:
    """(calls of the candidates in running order, output of the model), with their outputs edited."""
    calls: dict[str, list[Call]] = {}
    handles = []
    for name, module in candidates.items():

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
            tree = (tuple(args), dict(kwargs))
            calls.setdefault(name, []).append(Call(tree, output))
            return edit(name, tree, output) if edit else None

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def two_samples(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with at least two samples: one alone hides which arguments go with the batch."""
    given = (tuple(args), dict(kwargs))
    tensors = [leaf for _, leaf in leaves(given) if isinstance(leaf, Tensor)]
    if not tensors or max(tensors, key=lambda t: t.ndim).shape[:1] != (1,):
        return given

    doubled = map_batched(given, 1, lambda tensor: torch.cat([tensor, tensor]))
    try:
        model(*doubled[0], **doubled[1])
    except Exception:  # noqa: BLE001 - a model that takes one sample only
        return given
    return doubled[0], doubled[1]


def output_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in an output, also in an output dataclass."""
    if hasattr(tree, "to_tuple"):  # the output dataclasses of diffusers and transformers
        tree = tree.to_tuple()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    for _, leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def check_static(module: nn.Module, call: Call) -> None:
    """Run a module on fake tensors, which is what a graph of fixed shapes can do.

    Raises:
        IllegalError: sizes or branches in it depend on values.
    """
    if any(isinstance(leaf, FakeTensor) for _, leaf in leaves(call.tree)):
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with kept_caches(module, mode):
            _run_fake(module, call, mode)
    except DATA_DEPENDENT as error:
        raise IllegalError(needs_values(error)) from error
    except Exception:  # noqa: BLE001 - what else is wrong, the experiments say
        return


def _run_fake(module: nn.Module, call: Call, mode: FakeTensorMode) -> None:
    args, kwargs = map_leaves(
        call.tree, lambda _, leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf
    )
    with mode, torch.no_grad():
        module(*args, **kwargs)
