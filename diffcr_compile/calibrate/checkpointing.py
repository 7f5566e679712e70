"""Gradient checkpointing: a routed block keeps its inputs only, and is run again in the backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch.utils.checkpoint import checkpoint

from diffcr_compile.program import Program


@contextlib.contextmanager
def recomputed_blocks(program: Program) -> Iterator[None]:
    """Every routed block of a program is checkpointed while the context lasts.

    Routers, gathers and scatters stay outside: they are small, and top-k must not be decided twice.
    The forward of the block modules is replaced on the objects, which the user's model may share, and
    put back at the end. Random numbers are the same in both runs.
    """
    blocks = [program.module.get_submodule(spec.name) for spec in program.blocks]
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            again = functools.partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = again
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
