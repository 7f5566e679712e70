"""What a token-routed model computes, written a second time and slowly.

Nothing here comes from the package: the user's model runs eagerly, each routed block is wrapped,
and inside the wrapper one sample after the other is scored, sorted, cut by plain indexing and put
back. Agreement with the compiler's graphs is therefore agreement of two implementations.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """Where a block of a known model has its image tokens; written by hand, never found.

    Attributes:
        stream: key of the image tokens among the block's arguments: a position or a keyword.
        output: position of the image tokens in the block's output, None if it is the output.
        tables: keyword of the pair of rotary tables (text + N, ...) of the block, if any.
        text: how many text tokens stand in front of the image tokens in those tables.
        first: index of the first image token in the stream.
        num_tokens: image tokens N.
        shared: one index for the whole batch, from the mean score; the paper's gate still takes
            each sample's own score.
    """

    num_tokens: int
    stream: int | str = 0
    output: int | None = None
    tables: str | None = None
    text: int = 0
    first: int = 0
    shared: bool = False


SHAPES = {
    "dit": Shape(64, stream=0),
    "pixart": Shape(64, stream=0),
    "sd3": Shape(64, stream="hidden_states", output=1),
    "flux": Shape(
        36, stream="hidden_states", output=1, tables="image_rotary_emb", text=11, shared=True
    ),
}


@contextlib.contextmanager
def slowly_routed(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    column: Mapping[str, int],
    shape: Shape,
    gate: str = "straight_through",
    leaders: Mapping[str, str] | None = None,
    shortcuts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[nn.Module]:
    """Make `model` process only the K best tokens of each block while the context lasts.

    Args:
        model: the user's model; its blocks' ``forward`` are replaced and given back.
        weights: block name -> weights (C,) of its linear router.
        column: block name -> kept tokens K.
        shape: where the blocks have their tokens.
        gate: ``straight_through`` or ``paper`` (the residual times the sigmoid of the score).
        leaders: block name -> the earlier block whose choice of tokens it takes over.
        shortcuts: block name -> matrix A (C, C) and b (C,): a bypassed token x becomes x + A x + b.
    """
    chosen: dict[str, list[Tensor]] = {}
    wrapped = []
    try:
        for name, kept in column.items():
            block = model.get_submodule(name)
            leader = (leaders or {}).get(name, name)
            mine = chosen.setdefault(leader, [])
            follows = leader != name
            block.forward = _slow_forward(
                block.forward,
                weights[leader],
                kept,
                shape,
                gate,
                mine,
                follows,
                (shortcuts or {}).get(name),
            )
            wrapped.append(block)
        yield model
    finally:
        for block in wrapped:
            del block.forward


def _slow_forward(
    forward: Any,
    weight: Tensor,
    kept: int,
    shape: Shape,
    gate: str,
    chosen: list[Tensor],
    follows: bool,
    shortcut: tuple[Tensor, Tensor] | None = None,
) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        stream = args[shape.stream] if isinstance(shape.stream, int) else kwargs[shape.stream]
        bypassed = torch.stack([_bypassed(sample, shape, shortcut) for sample in stream])
        if kept == 0:
            return bypassed
        last = shape.first + shape.num_tokens
        scores = [sample[shape.first : last].float() @ weight for sample in stream]
        images, others = [], []
        if not follows:
            chosen.clear()
        for number, score in enumerate(scores):
            rank = torch.stack(scores).mean(0) if shape.shared else score
            if not follows:
                chosen.append(torch.sort(rank, descending=True).indices[:kept])
            best = chosen[number]
            result = forward(
                *_cut(args, number, best, shape), **_cut(kwargs, number, best, shape)
            )
            image = result if shape.output is None else result[shape.output]
            images.append(_put_back(bypassed[number], image[0], best, score, shape, gate))
            others.append(result)
        if shape.output is None:
            return torch.stack(images)
        return tuple(
            torch.stack(images) if place == shape.output else _joined(others, place)
            for place in range(len(others[0]))
        )

    return run


def _cut(arguments: Any, number: int, best: Tensor, shape: Shape) -> Any:
    """The arguments of one sample, with only the tokens `best`."""
    items = arguments.items() if isinstance(arguments, dict) else enumerate(arguments)
    made = {}
    for key, value in items:
        if isinstance(value, Tensor):
            value = value[number : number + 1]
        if key == shape.stream:
            rows = torch.cat(
                [
                    torch.arange(shape.first),
                    shape.first + best,
                    torch.arange(shape.first + shape.num_tokens, value.shape[1]),
                ]
            )
            value = value[:, rows]
        elif shape.tables is not None and key == shape.tables:
            rows = torch.cat([torch.arange(shape.text), shape.text + best])
            value = tuple(table[rows] for table in value)
        made[key] = value
    return made if isinstance(arguments, dict) else tuple(made.values())


def _bypassed(stream: Tensor, shape: Shape, shortcut: tuple[Tensor, Tensor] | None) -> Tensor:
    """One sample (L, C) of which every image token bypasses the block."""
    result = stream.clone()
    if shortcut is not None:
        matrix, offset = shortcut
        for token in range(shape.first, shape.first + shape.num_tokens):
            result[token] = stream[token] + matrix @ stream[token] + offset
    return result


def _put_back(
    stream: Tensor, processed: Tensor, best: Tensor, score: Tensor, shape: Shape, gate: str
) -> Tensor:
    """One sample (L, C) with the rows `best` of its image tokens processed."""
    result = stream.clone()
    result[: shape.first] = processed[: shape.first]
    behind = shape.first + len(best)
    if behind < len(processed):
        result[shape.first + shape.num_tokens :] = processed[behind:]
    for row, token in enumerate(best.tolist()):
        old, new = stream[shape.first + token], processed[shape.first + row]
        weight = torch.sigmoid(score[token]) if gate == "paper" else 1.0
        result[shape.first + token] = old + weight * (new - old) if gate == "paper" else new
    return result


def _joined(results: list[Any], place: int) -> Tensor | None:
    """Another stream of the block (text), whole again; None where the model's last block has none."""
    parts = [result[place] for result in results]
    return None if parts[0] is None else torch.cat(parts)
