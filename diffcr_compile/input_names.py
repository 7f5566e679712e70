"""What the tensors among a call's arguments are called as inputs of a graph: each by a name of its own."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

from diffcr_compile.blocks import Path


def input_names(
    paths: Sequence[Path], parameters: Sequence[str], other: str | None = None
) -> dict[str, Path]:
    """Name -> path, in the order of the paths: ``cond["text"]`` is ``cond_text``.

    A key may be any text, so what no identifier has becomes an underscore. An argument keeps its own name;
    what lies inside of another gets a number where its name is taken.

    Args:
        paths: of the tensors, in the arguments by parameter name.
        parameters: names of the forward's parameters.
        other: the parameter that takes ``**kwargs``, whose contents are called by their keywords.
    """
    taken = set(parameters)
    found: dict[str, Path] = {}
    for path in paths:
        name = str(path[0])
        if len(path) > 1:
            name = _unique(_identifier(path[1:] if name == other else path), taken)
            taken.add(name)
        found[name] = path
    return found


def _identifier(path: Path) -> str:
    name = re.sub(r"\W", "_", "_".join(str(key) for key in path))
    if keyword.iskeyword(name):
        return f"{name}_"
    return name if name.isidentifier() else f"_{name}"


def _unique(name: str, taken: set[str]) -> str:
    number, found = 2, name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found
