"""Modules that may be blocks: members of a container, or attributes with a number in their name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NUMBERED = re.compile(r"(.*?)_?\d+$")


def block_candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost members of containers that have submodules with parameters.

    In a model without any: attributes with a number in their name and equal weights.
    """
    found = list(_members(model)) or list(_siblings(model))
    yield from found


def _members(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, _CONTAINERS) or any(name.startswith(f"{f}.") for f in found):
            continue
        for child_name, child in module.named_children():
            is_container = isinstance(child, _CONTAINERS)
            if is_container or not any(True for _ in child.children()):
                continue
            if any(True for _ in child.parameters()):
                full = f"{name}.{child_name}" if name else child_name
                found.append(full)
                yield full, child


def _siblings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost children of one module that differ in the number in their name only."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{f}.") for f in found):
            continue
        groups: dict[Any, list[tuple[str, nn.Module]]] = {}
        for child_name, child in module.named_children():
            match = _NUMBERED.match(child_name)
            if match and not child_name.isdigit() and _is_block(child):
                full = f"{name}.{child_name}" if name else child_name
                groups.setdefault((match[1], type(child), shapes(child)), []).append(
                    (full, child)
                )
        for group in groups.values():
            if len(group) > 1:
                found += [full for full, _ in group]
                yield from group


def inner_candidates(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Candidates inside of the candidate `name`, with more than one layer."""
    for inner, child in _members(module):
        if _is_block(child):
            yield f"{name}.{inner}", child


def _is_block(module: nn.Module) -> bool:
    """More than one layer."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules()) > 1


def shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Names and shapes of the parameters: equal for blocks of one kind."""
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())
