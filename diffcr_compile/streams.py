"""The image stream of each block: which input is denoised, where it arrives, and what it becomes.

All of it is found by changing something in front of the blocks or in their place, and looking at what
moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import Path, get_leaf, leaves
from diffcr_compile.outside import Outside
from diffcr_compile.recorded import Call, IllegalError, output_tensors
from diffcr_compile.residual import Pairs, first_come, is_float

# What models call the noisy sample: an image to edit, or another condition, may have its shape.
SAMPLE_NAMES = ("sample", "hidden_states", "x", "x_t", "z", "z_t", "latents", "noisy_latents")


def sample_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Path:
    """The input that is denoised, () if none can be told from the others.

    In this order: a float tensor of the output's shape, among several the one that is called as samples
    usually are, else the first; one that differs from it in one axis; the
    only float tensor with more than two axes; codes (integers) of the output's batch and sides.
    """
    result = next(output_tensors(output), None)
    tensors = [
        (path, leaf)
        for path, leaf in leaves((tuple(args), dict(kwargs)))
        if isinstance(leaf, Tensor)
    ]
    floats = [(path, leaf) for path, leaf in tensors if leaf.is_floating_point()]
    wide = [(path, leaf) for path, leaf in floats if leaf.ndim >= 3]
    if result is None:
        return wide[0][0] if wide else ()
    alike = [p for p, leaf in floats if leaf.ndim >= 2 and leaf.shape == result.shape]
    if alike:
        return next((path for path in alike if path[-1] in SAMPLE_NAMES), alike[0])
    for path, leaf in wide:
        if leaf.ndim == result.ndim:
            differing = sum(a != b for a, b in zip(leaf.shape, result.shape, strict=True))
            if differing <= 1:
                return path
    for path, leaf in tensors:
        is_code = not (leaf.is_floating_point() or leaf.is_complex()) and leaf.ndim >= 2
        if is_code and leaf.shape in _without_channels(result.shape):
            return path
    return wide[0][0] if len(wide) == 1 else ()


def _without_channels(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """A shape with one axis left out, not the batch."""
    return [(*shape[:axis], *shape[axis + 1 :]) for axis in range(1, len(shape))]


@dataclasses.dataclass(frozen=True)
class Moved:
    """What moves in one block's arguments when the image does, all blocks being the identity.

    Attributes:
        tokens: argument (B, L, C) -> positions on axis 1 that move.
        rows: the same on axis 0.
        first_sample: both (rows, tokens) when the image of the first sample alone changes; None if
            there is but one sample.
        pairs: which input for which output; None if nobody has looked.
        outside: what else can be found out about the model around the blocks.
    """

    tokens: Mapping[Path, Tensor]
    rows: Mapping[Path, Tensor]
    first_sample: Mapping[Path, tuple[Tensor, Tensor]] | None
    pairs: Pairs | None
    outside: Outside


def moved_positions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    sample: Path,
    pairs: Mapping[str, Pairs] | None = None,
) -> dict[str, Moved]:
    """Per block: which positions of its arguments depend on the image, blocks being identity."""
    if not sample:
        return {}
    outside = Outside(model, (tuple(args), dict(kwargs)), candidates, sample, pairs or {})
    try:
        before = outside.before[0]
        after = outside.identity(outside.changed(slice(None)))[0]
        first = outside.identity(outside.changed(slice(1)))[0] if outside.size > 1 else None
    except Exception:  # noqa: BLE001 - a block whose output is no input cannot be an identity
        return {}
    found: dict[str, Moved] = {}
    for name in before:
        moved = moved_on(before[name][0], after[name][0])
        found[name] = Moved(
            tokens={path: axes[1] for path, axes in moved.items()},
            rows={path: axes[0] for path, axes in moved.items()},
            first_sample=moved_on(before[name][0], first[name][0]) if first else None,
            pairs=(pairs or {}).get(name),
            outside=outside,
        )
    return found


def moved_on(before: Call, after: Call) -> dict[Path, tuple[Tensor, Tensor]]:
    """Per argument of three axes: which rows of axis 0, and of axis 1, differ."""
    others = dict(leaves(after.tree))
    found = {}
    for path, leaf in leaves(before.tree):
        if is_float(leaf) and leaf.ndim == 3:
            differs = (leaf != others[path]).any(2)
            found[path] = (differs.any(1), differs.any(0))
    return found


def image_stream(
    call: Call, moved: Moved | None, pairs: Pairs | None = None
) -> tuple[Path, Path, tuple[int, int]]:
    """(path in the call, path in the output, (start, num_tokens)) of the image stream.

    Args:
        call: a call of the block.
        moved: which of its arguments follow the image.
        pairs: which input for which output; those of `moved`, or first come first served, without.
    """
    if moved is None:
        raise IllegalError(
            "it does not run when the other blocks are replaced by the identity"
        )
    results = [(path, leaf) for path, leaf in leaves(call.output) if isinstance(leaf, Tensor)]
    if not results:
        raise IllegalError(
            f"its output is {type(call.output).__name__}, with no tensor in a tuple or list"
        )
    if pairs is None:
        pairs = moved.pairs if moved.pairs is not None else first_come(call.tree, call.output)
    sources = {
        out: source for out, source in pairs.items() if is_float(get_leaf(call.tree, source))
    }
    if not sources:
        shapes = [tuple(leaf.shape) for _, leaf in results]
        raise IllegalError(
            f"no input has the shape of its output {shapes}, so a token cannot bypass it"
        )
    streams = [
        (sources[out], out)
        for out, _ in results
        if out in sources and sources[out] in moved.tokens and moved.tokens[sources[out]].any()
    ]
    if not streams:
        shapes = sorted({tuple(get_leaf(call.tree, path).shape) for path in sources.values()})
        raise IllegalError(
            f"no image token reaches it in a (batch, tokens, channels) stream; its streams are {shapes}"
        )
    if len(streams) > 1:
        raise IllegalError(f"it carries {len(streams)} image streams; one is needed")
    path, output_path = streams[0]
    _check_batch_axis(path, moved, tuple(get_leaf(call.tree, path).shape))
    where = moved.tokens[path].nonzero().flatten()
    start, count = int(where[0]), len(where)
    if int(where[-1]) - start + 1 != count:
        raise IllegalError(
            f"its {count} image tokens are not contiguous ({start} to {int(where[-1])})"
        )
    if count < 2:
        raise IllegalError(f"its stream has {count} image token")
    return path, output_path, (start, count)


def _check_batch_axis(path: Path, moved: Moved, shape: tuple[int, ...]) -> None:
    """The first sample alone must move fewer rows of axis 0, and the same ones of axis 1."""
    if moved.first_sample is None:
        return
    rows, tokens = moved.first_sample[path]
    if torch.equal(rows, moved.rows[path]) and not torch.equal(tokens, moved.tokens[path]):
        raise IllegalError(
            f"axis 1 of its stream {shape} runs along the samples of the batch and not, or not only, "
            "along tokens: the stream must be (batch, tokens, channels), with the batch first"
        )
