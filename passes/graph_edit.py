"""Small helpers to find and rewire the nodes around a block."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from diffcr_compile import routing
from diffcr_compile.block_calls import keeps
from diffcr_compile.blocks import BlockSpec, Path, TokenAxis, get_leaf, map_leaves
from diffcr_compile.errors import PassError

ROUTING_OPS = (
    routing.image_tokens,
    routing.select_tokens,
    routing.paper_gate,
    routing.gather_tokens,
    routing.nothing_added,
    routing.scatter_tokens,
    routing.blend_bins,
)


def block_node(graph: fx.Graph, name: str) -> fx.Node:
    """The one call of a block."""
    nodes: list[fx.Node] = list(graph.find_nodes(op="call_module", target=name))
    if len(nodes) != 1:
        raise PassError(f"{name} is called {len(nodes)} times in the graph, expected once")
    return nodes[0]


def output_node(block: fx.Node, path: Path) -> fx.Node | None:
    """The node of the image stream in a block's output; None if nobody uses it."""
    node: fx.Node | None = block
    for key in path:
        node = (
            next((u for u in node.users if _reads(u, key)), None) if node is not None else None
        )
    return node


def argument(block: fx.Node, path: Path) -> fx.Node:
    """The node that a block call has at `path`."""
    found = get_leaf((block.args, block.kwargs), path)
    if not isinstance(found, fx.Node):
        raise PassError(f"{block.name}: expected a tensor at {path}, found {found!r}")
    return found


def set_arguments(block: fx.Node, new: dict[Path, fx.Node]) -> None:
    """Replace the arguments at the given paths."""
    edited = map_leaves(
        (tuple(block.args), dict(block.kwargs)), lambda path, leaf: new.get(path, leaf)
    )
    block.args, block.kwargs = edited


def gather_arguments(
    graph: fx.Graph, block: fx.Node, spec: BlockSpec, index: fx.Node, suffix: str = ""
) -> dict[Path, fx.Node]:
    """Insert a gather for the stream and each token-aligned argument; path -> gathered node."""
    kept: dict[Path, fx.Node] = {}
    for number, leaf in enumerate((spec.stream, *spec.aligned)):
        source = kept.get(leaf.path, argument(block, leaf.path))
        name = (
            f"{block.name}_kept{suffix}"
            if number == 0
            else f"{block.name}_kept{suffix}_aligned_{number}"
        )
        kept[leaf.path] = graph.create_node(
            "call_function",
            routing.gather_tokens,
            gather_args(source, index, leaf, spec),
            name=name,
        )
    return kept


def gather_bypassed(
    graph: fx.Graph, bypassed: fx.Node, index: fx.Node, spec: BlockSpec
) -> fx.Node:
    """Insert a gather of what kept tokens would be had they bypassed the block, which a gate weighs the block against."""
    return graph.call_function(
        routing.gather_tokens,
        (bypassed, index, 1, spec.stream.start, spec.num_tokens, True),
    )


def gather_args(
    source: fx.Node, index: fx.Node, leaf: TokenAxis, spec: BlockSpec
) -> tuple[fx.Node, fx.Node, int, int, int, bool]:
    return (source, index, leaf.axis, leaf.start, spec.num_tokens, leaf.batched)


def replace_uses(node: fx.Node, new: fx.Node, keep: Callable[[fx.Node], bool]) -> None:
    """Let every user of `node` use `new`, but those for which `keep` is true."""
    for user in list(node.users):
        if not keep(user):
            user.replace_input_with(node, new)


def erase_unused(graph: fx.Graph) -> None:
    """Dead code elimination that trusts blocks and routers to have no side effects."""
    graph.eliminate_dead_code(keeps)


def _reads(user: fx.Node, key: int | str) -> bool:
    return user.target is operator.getitem and user.args[1] == key
