"""Run a model and record what its blocks are given and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffcr_compile.blocks import leaves, map_leaves, show_path
from diffcr_compile.data_dependent import DATA_DEPENDENT, needs_values
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.program import map_batched

# (name of a block, its (args, kwargs), its output) -> what it returns instead
Edit = Callable[[str, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One recorded call of a block.

    Attributes:
        tree: (args, kwargs) as they were before the call.
        output: what it returned.
        fault: what it did to its arguments, for which it may not be routed; None if nothing.
    """

    tree: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    fault: str | None = None


class IllegalError(Exception):
    """Why a candidate may not be routed."""


class Given:
    """The arguments of a call before it, by which to see what it does to them.

    Attributes:
        tree: (args, kwargs); lists and dicts are copies, tensors are not.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.tree: Any = map_leaves((tuple(args), dict(kwargs)), lambda _, leaf: leaf)
        self._versions = [_version(leaf) for _, leaf in leaves(self.tree)]

    def fault(self, args: Any, kwargs: Any) -> str | None:
        """What the call did to its arguments, in words; None if it left them alone."""
        before = list(leaves(self.tree))
        after = list(leaves((tuple(args), dict(kwargs))))
        if [(p, id(leaf)) for p, leaf in before] != [(p, id(leaf)) for p, leaf in after]:
            return (
                "it changes a list or a dict that it is given, which a graph cannot do; let it return "
                "what is new, and let the model keep it"
            )
        for (path, leaf), version in zip(before, self._versions, strict=True):
            if _version(leaf) != version:
                return (
                    f"it writes to its input {show_path(path)} in place, so that bypassed tokens would "
                    "not stay what they were; write x = x + ... in the place of x += ..."
                )
        return None


def _version(leaf: Any) -> int | None:
    """How often a tensor was written to, as torch counts it."""
    is_counted = isinstance(leaf, Tensor) and not leaf.is_inference()
    return leaf._version if is_counted else None


def fresh(tree: Any) -> Any:
    """The same arguments for one more run, which may write to them."""
    return map_leaves(tree, lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def run_recorded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    edit: Edit | None,
) -> tuple[dict[str, list[Call]], Any]:
    """(calls of the candidates in running order, output of the model), with their outputs edited."""
    calls: dict[str, list[Call]] = {}

    def recorded(name: str, call: Call) -> Any:
        calls.setdefault(name, []).append(call)
        return edit(name, call.tree, call.output) if edit else None

    output = run_edited(model, args, kwargs, candidates, recorded)
    return calls, output


def run_edited(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    edit: Callable[[str, Call], Any],
) -> Any:
    """Output of the model, with the outputs of the candidates edited. Of their calls nothing is kept."""
    handles = []
    running: list[tuple[Given, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = Given(args, kwargs)
        running.append((given, fresh(given.tree)))

    for name, module in candidates.items():

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
            given, copies = running.pop()
            fault = given.fault(args, kwargs)
            return edit(name, Call(copies if fault else given.tree, output, fault))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        args, kwargs = fresh((tuple(args), dict(kwargs)))
        return model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


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
        args, kwargs = fresh(doubled)
        model(*args, **kwargs)
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
        with kept_caches(module):
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
