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
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

_LruCache: Any = functools._lru_cache_wrapper
# How deep attributes of modules are followed: a helper object, its dict of tables, a list in it.
_DEPTH = 3
_TOOLS = {"torch", "sympy", "mpmath", "numpy", "onnx", "onnx_ir", "onnxscript", "typing", "re"}
_WIDE = (torch.float64, torch.complex128)


class _FunctoolsCaches:
    """The caches of functools in this process, but for those of `_TOOLS`.

    Only the garbage collector knows them all, and to ask it takes tenths of a second, while an experiment on fake tensors takes
    hundredths. So it is asked about classes that are new here and after an import.
    """

    def __init__(self) -> None:
        self._found: weakref.WeakSet[Any] = weakref.WeakSet()
        self._asked_for: weakref.WeakSet[type] = weakref.WeakSet()
        self._imported = 0

    def of(self, kinds: set[type], spaces: list[Mapping[str, Any]]) -> list[Any]:
        """Those that modules of these classes may reach; `spaces` are the names in and beside the classes."""
        if len(sys.modules) != self._imported or not kinds <= set(self._asked_for):
            self._imported = len(sys.modules)
            self._asked_for.update(kinds)
            self._found.update(_that_are_none_of_a_tool(gc.get_objects()))
        for space in spaces:  # a function that was defined again, as in a notebook
            self._found.update(_that_are_none_of_a_tool(space.values()))
        return list(self._found)


_functools_caches = _FunctoolsCaches()


@contextlib.contextmanager
def kept_caches(module: nn.Module) -> Iterator[None]:
    """Afterwards a module's caches are what they were: its attributes, and tables beside its classes.

    Caches of functools may be emptied, which costs their owner a second computation at most.

    Args:
        module: that runs on fake tensors or in float64, or is exported.
    """
    own = [(held, held.copy()) for held in _containers(module)]
    kinds = _classes(module)
    spaces = _spaces(kinds)
    beside = [(table, table.copy()) for table in _tables(spaces)]
    misses = {
        cache: cache.cache_info().misses for cache in _functools_caches.of(kinds, spaces)
    }
    try:
        yield
    finally:
        for held, content in own:
            _put_back(held, content)
        for table, content in beside:
            _drop_foreign(table, content)
        for cache in _functools_caches.of(kinds, spaces):
            if cache.cache_info().misses != misses.get(cache):
                _empty_if_foreign(cache)


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


def _empty_if_foreign(cache: Any) -> None:
    if any(map(_is_foreign, _cached(cache))):
        cache.cache_clear()


def _that_are_none_of_a_tool(objects: Iterable[Any]) -> Iterator[Any]:
    return (held for held in objects if type(held) is _LruCache and not _is_of_a_tool(held))


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


def _classes(module: nn.Module) -> set[type]:
    """Of the modules in it, but for torch's own."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    return {kind for kind in kinds if kind.__module__.partition(".")[0] != "torch"} - {object}


def _spaces(kinds: set[type]) -> list[Mapping[str, Any]]:
    """What has a name in the classes or in their files."""
    files = {kind.__module__ for kind in kinds} & set(sys.modules)
    return [*map(vars, kinds), *(vars(sys.modules[name]) for name in files)]


def _tables(spaces: list[Mapping[str, Any]]) -> Iterator[dict[Any, Any]]:
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
