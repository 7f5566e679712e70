"""An experiment leaves nothing behind in the caches that a model keeps.

Models keep tables by number of tokens: in an attribute, in a dict, under ``functools.lru_cache``. What a run on
fake tensors puts there has no data, and what a run in float64 puts there has the wrong type: the user's model
would compute with it from then on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

_LruCache: Any = functools._lru_cache_wrapper
# How deep attributes of modules are followed: a helper object, its dict of tables, a list in it.
_DEPTH = 3
_TOOLS = {"torch", "sympy", "mpmath", "numpy", "onnx", "onnx_ir", "onnxscript", "typing", "re"}
_WIDE = (torch.float64, torch.complex128)


@contextlib.contextmanager
def kept_caches(module: nn.Module, mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Afterwards a module's caches are what they were: its attributes, and tables beside its classes.

    Caches of functools may be emptied, which costs their owner a second computation at most.

    Args:
        module: that runs on fake tensors or in float64, or is exported.
        mode: of the fake tensors, where none of them is to outlive the context; None otherwise.
    """
    own = [(held, held.copy()) for held in _containers(module)]
    beside = [(table, table.copy()) for table in _tables_beside(module)]
    references = sys.getrefcount(mode)
    try:
        yield
    finally:
        for held, content in own:
            _put_back(held, content)
        # Each fake tensor refers to its mode; to look for caches takes a tenth of a second.
        if mode is None or sys.getrefcount(mode) > references:
            for table, content in beside:
                _drop_foreign(table, content)
            _empty_functools_caches()


def _containers(module: nn.Module) -> list[Any]:
    """Attributes of all modules, and the dicts and lists in them."""
    found: list[Any] = []
    seen: set[int] = set()

    def collect(held: Any, depth: int) -> None:
        if id(held) in seen:
            return
        seen.add(id(held))
        found.append(held)
        for value in (held.values() if isinstance(held, dict) else held) if depth else ():
            if type(value) in (dict, list):
                collect(value, depth - 1)
            elif _is_helper(value):
                collect(vars(value), depth - 1)

    for part in module.modules():
        collect(vars(part), _DEPTH)
    return found


def _is_helper(value: Any) -> bool:
    """Whether it is an object of a class of the user's: no tensor, module, function or class."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in {"builtins", "torch", "collections", "functools"}:
        return False
    return hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module))


def _put_back(held: Any, content: Any) -> None:
    same = len(held) == len(content) and (
        all(held.get(key, held) is value for key, value in content.items())
        if isinstance(held, dict)
        else all(one is two for one, two in zip(held, content, strict=True))
    )
    if same:
        return
    held.clear()
    if isinstance(held, dict):
        held.update(content)
    else:
        held.extend(content)


def _drop_foreign(table: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Anything may stand in such a table, so only what the experiment made is taken out."""
    for key, value in list(table.items()):
        if value is content.get(key) or not _is_foreign(value):
            continue
        if key in content:
            table[key] = content[key]
        else:
            del table[key]


def _empty_functools_caches() -> None:
    for cache in gc.get_objects():
        if type(cache) is not _LruCache or _is_of_a_tool(cache):
            continue
        if cache.cache_info().currsize and any(map(_is_foreign, _cached(cache))):
            cache.cache_clear()


def _is_of_a_tool(cache: Any) -> bool:
    """Whether a cache is of a package that keeps thousands of them, and none of a model's tensors."""
    return str(getattr(cache, "__module__", "")).partition(".")[0] in _TOOLS


def _cached(cache: Any) -> Iterator[Any]:
    """What an ``lru_cache`` holds, with and without a limit."""
    for held in gc.get_referents(cache):
        if isinstance(held, dict):
            yield from held.values()
        else:
            yield held


def _tables_beside(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Dicts that are attributes of the modules' classes, or global in their files."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    kinds = {kind for kind in kinds if kind.__module__.partition(".")[0] != "torch"}
    files = {kind.__module__ for kind in kinds} - {"builtins"}
    spaces: list[Mapping[str, Any]] = [vars(kind) for kind in kinds]
    spaces += [vars(sys.modules[name]) for name in files if name in sys.modules]
    for space in spaces:
        yield from [value for value in space.values() if type(value) is dict]


def _is_foreign(value: Any) -> bool:
    """Whether a tensor in it has no data, or a type that experiments compute in."""
    if not isinstance(value, (Tensor, tuple, list, dict)):
        return False
    return any(
        isinstance(leaf, (FakeTensor, FunctionalTensor))
        or (isinstance(leaf, Tensor) and leaf.dtype in _WIDE)
        for leaf in pytree.tree_leaves(value)
    )
