"""A block's arguments cut down to some of its image tokens: what the gathers of a routed block do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffcr_compile.blocks import Path, TokenAxis, map_leaves
from diffcr_compile.routing import gather_tokens


def cut_arguments(tree: Any, axes: Sequence[TokenAxis], index: Tensor, num_tokens: int) -> Any:
    """A call's (args, kwargs) with every axis in `axes` cut to the tokens of `index` (B, K).

    Args:
        tree: (args, kwargs) of the block call.
        axes: the stream and the token-aligned arguments.
        index: positions of the kept tokens, per sample.
        num_tokens: image tokens N that are present.
    """

    def cut(path: Path, leaf: Any) -> Any:
        for axis in axes:
            if axis.path == path:
                leaf = gather_tokens(
                    leaf, index, axis.axis, axis.start, num_tokens, axis.batched
                )
        return leaf

    return map_leaves(tree, cut)
