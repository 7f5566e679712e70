"""``dcr.remove``: give the user's model back."""

from __future__ import annotations

from torch import nn

from diffcr_compile.errors import UsageError
from diffcr_compile.program import DiTGraph


def remove(routed: nn.Module, *, accept_changes: bool = False) -> nn.Module:
    """The model that a graph was made from, as it was: same object, same modules, same bits.

    Routing puts nothing on the model. What using the graph leaves on modules that the two share, the
    training switch and gradients, is put back to what it was.

    Args:
        routed: from :func:`route` or :func:`freeze`.
        accept_changes: give the model back also where its weights were changed meanwhile.

    Raises:
        UsageError: weights of the model were written to since; names them.
    """
    origin = routed.program.origin if isinstance(routed, DiTGraph) else None
    if origin is None:
        raise UsageError(
            f"expected a graph from dcr.route() or dcr.freeze(), got {type(routed).__name__}",
            code="DCR-U025",
        )
    return origin.restore(accept_changes)
