"""Stand-ins for blocks: the identity in a block's place, so that the rest of a model runs without it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from diffcr_compile.blocks import Path, get_leaf, leaves, map_leaves
from diffcr_compile.planning.copies import fill_meta
from diffcr_compile.recorded import Call
from diffcr_compile.residual import identity_output


def stand_in(block: nn.Module, call: Call, *, reads_all: bool = False) -> None:
    """Make `block` the identity; where no input has the shape of an output, it runs as it is.

    Args:
        block: a copy that may be changed. Its submodules stay: the model may call them itself.
        call: how the block was called.
        reads_all: every input goes into the output, or torch.export would drop it from the call.
    """
    partners = _partners(call)
    whole = block.forward

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if partners is None:
            fill_meta(block)
            return whole(*args, **kwargs)
        tree = (args, kwargs)
        read: Any = None
        if reads_all:  # counted, so that dtypes do not matter, and 0 in the end
            read = sum((t != 0).sum() for _, t in leaves(tree) if isinstance(t, Tensor)) * 0

        def partner(path: Path, leaf: Any) -> Any:
            if path not in partners:
                return leaf
            given = get_leaf(tree, partners[path])
            return given if read is None else given + read

        return map_leaves(call.output, partner)

    block.forward = forward


def _partners(call: Call) -> dict[Path, Path] | None:
    """Output -> the input that takes its place when the block is the identity; None without one."""
    identity = identity_output(call.tree, call.output)
    inputs = [(path, leaf) for path, leaf in leaves(call.tree) if isinstance(leaf, Tensor)]
    found: dict[Path, Path] = {}
    for path, leaf in leaves(identity):
        if not isinstance(leaf, Tensor):
            continue
        given = next((source for source, tensor in inputs if tensor is leaf), None)
        if given is None:
            return None
        found[path] = given
    return found
