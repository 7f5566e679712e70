"""What a block computes, written down op by op on fake tensors: do two blocks compute the same?

A block's trace names every ATen op with its arguments: tensors by where they come from (an input's
path, a parameter's name, an earlier op), everything else by value. Two blocks with equal traces run
the same operations on the same inputs; they differ in the values of their parameters only. Class
names and attributes such as a layer's number do not count.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffcr_compile.blocks import leaves


class OpTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records ops while it is active; between :meth:`start` and :meth:`stop` those of one block.

    Enter it after the fake mode, so that it sees every op first.

    Attributes:
        counts: how often each op ran, all blocks and everything else.
        new_bytes: bytes of all tensors that ops made (views and in-place results not counted).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.new_bytes = 0
        self._labels: dict[int, str] | None = None
        self._kept: list[
            Any
        ] = []  # keeps every labelled tensor alive, so that ids stay unique
        self._lines: list[str] = []

    def start(self, module: nn.Module, tree: Any, contents: Mapping[str, str]) -> None:
        """A block begins.

        Args:
            module: the block.
            tree: (args, kwargs) of the call.
            contents: digest of each buffer of the block, by name: a mask is part of what it computes.
        """
        self._labels, self._kept, self._lines = {}, [], []
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._name(parameter, f"parameter {name} {_form(parameter)}")
        for name, buffer in module.named_buffers(remove_duplicate=False):
            self._name(buffer, f"buffer {name} {_form(buffer)} {contents.get(name)}")
        for path, leaf in leaves(tree):
            if isinstance(leaf, Tensor):
                self._name(leaf, f"input {path} {_form(leaf)}")

    def stop(self, output: Any) -> str:
        """The block ends; returns a digest of its trace."""
        self._lines.append(f"output {self._show(output)}")
        digest = hashlib.sha256("\n".join(self._lines).encode()).hexdigest()
        self._labels, self._kept = None, []
        return digest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        shown = (
            f"{func} {self._show(args)} {self._show(kwargs)}"
            if self._labels is not None
            else ""
        )
        result = func(*args, **kwargs)
        self.counts[str(func)] += 1
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        makes_new = all(entry.alias_info is None for entry in func._schema.returns)
        if makes_new:
            self.new_bytes += sum(t.numel() * t.element_size() for t in tensors)
        if self._labels is not None:
            self._lines.append(shown)
            for index, tensor in enumerate(tensors):
                self._name(tensor, f"%{len(self._lines)}.{index}")
        return result

    def _name(self, tensor: Tensor, label: str) -> None:
        assert self._labels is not None
        self._labels[id(tensor)] = label
        self._kept.append(tensor)

    def _show(self, tree: Any) -> str:
        assert self._labels is not None
        parts, spec = pytree.tree_flatten(tree)
        return f"{[self._leaf(part) for part in parts]} {spec}"

    def _leaf(self, leaf: Any) -> str:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        assert self._labels is not None
        if id(leaf) not in self._labels:
            # A tensor from elsewhere has unknown contents: it is equal to nothing but itself.
            self._name(leaf, f"foreign {id(leaf)}")
        return self._labels[id(leaf)]


def buffer_contents(module: nn.Module) -> dict[str, str]:
    """Digest of each buffer's values, by name; none for buffers without values (meta device)."""
    return {
        name: hashlib.sha256(
            buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if not buffer.is_meta
    }


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
