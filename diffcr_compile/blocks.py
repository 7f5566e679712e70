"""What the compiler knows about a block: where its tokens are, and how to reach its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

# The way from a call's (args, kwargs) to one leaf: (0, "args" index, ...) or (1, keyword, ...).
Path = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenAxis:
    """One axis of one argument that runs along the image tokens.

    Attributes:
        path: where the argument stands in the block call, see :func:`show_path`.
        axis: the axis that runs along tokens.
        start: index of the first image token on that axis (text tokens may come first).
        batched: each sample is gathered by its own index. The batch is on axis 0; if that is the
            token axis, the argument has no batch axis and the gather gives it one.
    """

    path: Path
    axis: int
    start: int = 0
    batched: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class StreamView:
    """How a block with another layout is shown with its streams as (batch, tokens, channels).

    Attributes:
        layout: ``tokens_first`` is (tokens, batch, channels); ``unbatched`` is (tokens, channels), one
            sample.
        inputs: arguments that have that layout.
        outputs: outputs that have it.
    """

    layout: Literal["tokens_first", "unbatched"]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockSpec:
    """A block that may be routed, with the roles of its arguments.

    Attributes:
        name: qualified module name in the user's model.
        stream: the image stream, (B, L, C), tokens on axis 1.
        output: path of the image stream in the block's output; ``()`` if the output is the tensor.
        aligned: token-aligned arguments, cut by the same index as the stream.
        num_tokens: image tokens N (L - N other tokens may share the stream).
        width: channels C of the stream.
        shares_index: the block takes token-aligned arguments without a batch axis only, so one
            index must serve the whole batch.
        removable: the image stream is the block's only output, so keep ratio 0 is the identity.
        error: permutation error found by the legality test (relative, float64).
        members: the model's own blocks in a fused span; only the block itself otherwise.
        bypass: what a bypassed token gets: itself from the stream ("stream"), or nothing ("zeros"),
            for a part of a block whose output the block adds to its stream.
        view: how the block is shown in the graph, if it has another layout. All else that stands here
            is about the block as shown.
    """

    name: str
    stream: TokenAxis
    output: Path
    aligned: tuple[TokenAxis, ...]
    num_tokens: int
    width: int
    shares_index: bool
    removable: bool
    error: float
    members: tuple[str, ...] = ()
    bypass: Literal["stream", "zeros"] = "stream"
    view: StreamView | None = None

    def __post_init__(self) -> None:
        if not self.members:
            object.__setattr__(self, "members", (self.name,))

    def moved(self, block: str, other: str) -> BlockSpec:
        """The same for the part of another block of the same structure."""
        name = other + self.name.removeprefix(block)
        return dataclasses.replace(self, name=name, members=())


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A candidate that stays dense, and why."""

    block: str
    reason: str


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, leaf) for each leaf of nested tuples, lists and dicts, None included."""
    if isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from leaves(item, (*path, index))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, tree


def get_leaf(tree: Any, path: Path) -> Any:
    """The leaf at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def map_leaves(tree: Any, edit: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A copy of `tree` with every leaf replaced by ``edit(path, leaf)``."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*(map_leaves(v, edit, (*path, i)) for i, v in enumerate(tree)))
    if isinstance(tree, (tuple, list)):
        kind = tuple if isinstance(tree, tuple) else list
        return kind(map_leaves(item, edit, (*path, i)) for i, item in enumerate(tree))
    if isinstance(tree, dict):
        return {key: map_leaves(item, edit, (*path, key)) for key, item in tree.items()}
    return edit(path, tree)


def show_path(path: Path) -> str:
    """``args[0]`` or ``kwargs['image_rotary_emb'][1]``, for messages."""
    root = ("args", "kwargs")[int(path[0])] if path else "output"
    return root + "".join(f"[{key!r}]" for key in path[1:])
