"""Which input each output of a block would be if the block did nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import Path, get_leaf, leaves, map_leaves
from diffcr_compile.float64 import Float64Mode, float64_copy, float64_tree
from diffcr_compile.recorded import Call, fresh

# Parameters are divided by this to see what of a block is no parameter's work; a power of two, so exact.
SHRINK = 2.0**20
# Output path -> path in (args, kwargs) of the input that takes its place when the block is bypassed.
Pairs = Mapping[Path, Path]


def identity_output(tree: Any, output: Any, pairs: Pairs | None = None) -> Any:
    """The output with each tensor replaced by its input; one without an input stays."""
    if pairs is None:
        pairs = first_come(tree, output)
    inputs = dict(leaves(tree))

    def partner(path: Path, leaf: Any) -> Any:
        given = inputs.get(pairs[path]) if path in pairs else None
        return given if _same_form(given, leaf) else leaf

    return map_leaves(output, partner)


def first_come(tree: Any, output: Any) -> dict[Path, Path]:
    """The first input of its shape for each output, each input once."""
    inputs = [(path, leaf) for path, leaf in leaves(tree) if isinstance(leaf, Tensor)]
    pairs: dict[Path, Path] = {}
    for path, leaf in leaves(output):
        for index, (source, given) in enumerate(inputs):
            if _same_form(given, leaf):
                pairs[path] = source
                inputs.pop(index)
                break
    return pairs


def _same_form(one: Any, two: Any) -> bool:
    return (
        isinstance(one, Tensor)
        and isinstance(two, Tensor)
        and (one.shape == two.shape and one.dtype == two.dtype)
    )


def residual_pairs(module: nn.Module, call: Call) -> dict[Path, Path]:
    """Which input each output would be without the block's work.

    Where shapes leave a choice, the input that the output still follows one to one when the block's
    parameters are next to nothing: the one it is added to. Otherwise the first that fits.
    """
    floats = [(p, t) for p, t in leaves(call.tree) if is_float(t)]
    fits = {
        path: [source for source, given in floats if _same_form(given, leaf)]
        for path, leaf in leaves(call.output)
        if is_float(leaf)
    }
    first = first_come(call.tree, call.output)
    choices = [(out, source) for out, sources in fits.items() for source in sources]
    if len(choices) == len(dict(choices)) == len({source for _, source in choices}):
        return first  # nothing to choose
    try:
        gains = _gains(module, call, fits)
    except Exception:  # noqa: BLE001 - the user's block may raise anything
        return first
    pairs = {path: source for path, source in first.items() if path not in fits}
    for out, source in sorted(choices, key=lambda pair: not follows(gains[pair])):
        if out not in pairs and source not in pairs.values():
            pairs[out] = source
    return pairs


def follows(gain: float) -> bool:
    """Whether an output with this gain is its input and something added to it."""
    return 0.5 < gain < 1.5


def shrink(module: nn.Module, factor: float = 1 / SHRINK) -> None:
    """Multiply all parameters, in place."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data *= factor


def gain(run: Callable[[Any], Any], tree: Any, source: Path) -> dict[Path, float]:
    """How much of a small change of the input at `source` arrives unchanged in each output."""
    generator = torch.Generator().manual_seed(3)
    given: Tensor = get_leaf(tree, source)
    change = noise(given, generator).to(given)
    before = dict(leaves(run(tree)))
    changed = map_leaves(tree, lambda path, leaf: leaf + change if path == source else leaf)
    return {
        path: float(((leaf - before[path]) * change).sum() / change.square().sum())
        for path, leaf in leaves(run(changed))
        if is_float(leaf) and leaf.shape == change.shape
    }


def _gains(
    module: nn.Module, call: Call, fits: Mapping[Path, Sequence[Path]]
) -> dict[tuple[Path, Path], float]:
    block = float64_copy(module)
    shrink(block)

    def run(tree: Any) -> Any:
        with Float64Mode():
            args, kwargs = fresh(tree)
            return block(*args, **kwargs)

    tree = float64_tree(call.tree)
    found: dict[tuple[Path, Path], float] = {}
    for source in dict.fromkeys(s for sources in fits.values() for s in sources):
        for path, value in gain(run, tree, source).items():
            found[path, source] = value
    return found


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers in float64, equal on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def is_float(leaf: Any) -> bool:
    """Whether it is a tensor of floating-point numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
