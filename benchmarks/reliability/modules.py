"""Random diffusion-transformer-like models: stacks of legal and illegal pieces, through every stage.

    python -m benchmarks.reliability.modules --count 500 --out results.json

Every block is drawn from pieces that treat tokens alike (attention, feed-forward, modulation, a mask, a table with a row per
token) and pieces that do not (a convolution, a shift, a running sum, windows, a bias by place). A block with one of the latter
must be refused with a reason; one without must be routed. What is routed must equal the model bit for bit while all
tokens are kept, a slow reference on half of them, and ONNX Runtime must agree.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.runtime import load

WIDTH, BATCH = 16, 2
# Sums in another order and fp32; a wrong token is off by 0.01 and more.
CLOSE = 1e-4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a random model is made of."""

    seed: int
    tokens: int
    pieces: tuple[tuple[str, ...], ...]
    masked: bool
    table: bool
    stream_last: bool
    in_tuple: bool
    tokens_first: bool


LEGAL = ("attention", "mlp", "modulation", "mean", "linear_attention", "scale")
ILLEGAL = ("convolution", "shift", "running_sum", "windows", "bias_by_place", "every_second")


def draw(seed: int) -> Recipe:
    r = random.Random(seed)
    pieces = []
    for _ in range(r.choice((2, 3))):
        block = [r.choice(LEGAL) for _ in range(r.choice((1, 2, 3)))]
        if "attention" not in block and "mlp" not in block:
            block.append("mlp")  # a block has more than one layer
        if r.random() < 0.35:
            block.insert(r.randrange(len(block) + 1), r.choice(ILLEGAL))
        pieces.append(tuple(block))
    flag = lambda: r.random() < 0.4  # noqa: E731
    return Recipe(
        seed, r.choice((8, 12, 16)), tuple(pieces), flag(), flag(), flag(), flag(), flag()
    )


class Piece(nn.Module):
    def __init__(self, kind: str, tokens: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(
            WIDTH, 3 * WIDTH if "attention" in kind or kind == "windows" else WIDTH
        )
        self.outer = nn.Linear(WIDTH, WIDTH)
        if kind == "convolution":
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        if kind == "bias_by_place":
            self.bias = nn.Parameter(0.5 * torch.randn(tokens, WIDTH))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x)
        if self.kind == "attention":
            y = self.attend(y, mask)
        elif self.kind == "windows":
            y = self.attend(y.unflatten(1, (-1, 4)).flatten(0, 1), None).view_as(x)
        elif self.kind == "linear_attention":
            q, k, v = self.inner(y).chunk(3, -1)
            y = q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v)
        elif self.kind == "mlp":
            y = torch.nn.functional.gelu(self.inner(y))
        elif self.kind == "modulation":
            y = y * (1 + self.inner(c)[:, None])
        elif self.kind == "mean":
            y = y + self.inner(y).mean(1, keepdim=True)
        elif self.kind == "scale":
            y = y * self.inner(y).sigmoid()
        elif self.kind == "convolution":
            y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "shift":
            y = y.roll(1, 1) + self.inner(y)
        elif self.kind == "running_sum":
            y = self.inner(y).cumsum(1)
        elif self.kind == "bias_by_place":
            y = self.inner(y) + self.bias[: y.shape[1]]
        elif self.kind == "every_second":
            y = torch.cat([y[:, ::2], self.inner(y)[:, 1::2]], 1)
        return x + self.outer(y)

    def attend(self, y: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.inner(y).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        if mask is not None:
            scores = scores + mask[:, None]
        return scores.softmax(-1) @ v


class RandomBlock(nn.Module):
    def __init__(self, recipe: Recipe, pieces: tuple[str, ...]) -> None:
        super().__init__()
        self.recipe = recipe
        # No list: its members would be blocks themselves.
        self.names = ("first", "second", "third", "fourth", "fifth")[: len(pieces)]
        for name, kind in zip(self.names, pieces, strict=True):
            self.add_module(name, Piece(kind, recipe.tokens))

    def forward(self, *given: Tensor | None, **named: Any) -> Any:
        x, c = (given[1], given[0]) if self.recipe.stream_last else (given[0], given[1])
        assert x is not None
        if self.recipe.tokens_first:
            x = x.transpose(0, 1)
        if named.get("table") is not None:
            x = x * named["table"]
        for name in self.names:
            x = self.get_submodule(name)(x, c, named.get("mask"))
        if self.recipe.tokens_first:
            x = x.transpose(0, 1)
        return (x,) if self.recipe.in_tuple else x


class RandomModel(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.enter, self.time, self.leave = (
            nn.Linear(3, WIDTH),
            nn.Linear(1, WIDTH),
            nn.Linear(WIDTH, 3),
        )
        self.blocks = nn.ModuleList([RandomBlock(recipe, pieces) for pieces in recipe.pieces])
        self.register_buffer("table", 0.5 + torch.rand(1, recipe.tokens, WIDTH))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        r = self.recipe
        x, c = self.enter(x), self.time(t[:, None] / 1000)
        x = x.transpose(0, 1) if r.tokens_first else x
        for block in self.blocks:
            named = {"mask": mask, "table": self.table if r.table else None}
            x = block(*((c, x) if r.stream_last else (x, c)), **named)
            x = x[0] if r.in_tuple else x
        return self.leave(x.transpose(0, 1) if r.tokens_first else x)

    def reference(
        self, x: Tensor, t: Tensor, mask: Tensor | None, routers: Any, kept: int
    ) -> Tensor:
        """One sample and one kept token after the other, where a router stands."""
        r, c = self.recipe, self.time(t[:, None] / 1000)
        x = self.enter(x)
        for name, block in self.blocks.named_children():
            router, table = routers.get(f"blocks.{name}"), self.table if r.table else None
            if router is None:
                x = self.run(block, x, c, mask, table)
                continue
            rows = []
            for b in range(len(x)):
                best = sorted(router(x[b : b + 1])[0].argsort(descending=True)[:kept].tolist())
                cut_mask = None if mask is None else mask[b : b + 1, best]
                cut_table = None if table is None else table[:, best]
                made = self.run(block, x[b : b + 1, best], c[b : b + 1], cut_mask, cut_table)[
                    0
                ]
                row = x[b].clone()
                for place, token in enumerate(best):
                    row[token] = made[place]
                rows.append(row)
            x = torch.stack(rows)
        return self.leave(x)

    def run(self, block: nn.Module, x: Tensor, c: Tensor, mask: Any, table: Any) -> Tensor:
        r = self.recipe
        x = x.transpose(0, 1) if r.tokens_first else x
        made = block(*((c, x) if r.stream_last else (x, c)), mask=mask, table=table)
        made = made[0] if r.in_tuple else made
        return made.transpose(0, 1) if r.tokens_first else made


@torch.no_grad()
def verdict(recipe: Recipe, folder: Path) -> str:
    """``routed`` or ``refused`` if all is as it must be, else what is wrong."""
    model = RandomModel(recipe).eval()
    inputs = {"x": torch.randn(BATCH, recipe.tokens, 3), "t": torch.tensor([900.0, 300.0])}
    if recipe.masked:
        inputs["mask"] = torch.randn(BATCH, recipe.tokens)
    legal = {f"blocks.{i}" for i, p in enumerate(recipe.pieces) if not set(p) & set(ILLEGAL)}
    dense = model(**inputs)
    try:
        routed = dcr.route(model, inputs, RoutingConfig(granularity="block"))
    except UnsupportedModelError as error:
        if legal:
            return f"WRONG refused {sorted(legal)}: {error.message[:300]}"
        reasons = [line for line in error.message.splitlines() if "blocks." in line]
        return "refused" if len(reasons) == len(recipe.pieces) else "WRONG without a reason"
    found = set(routed.routers)
    if found - legal:
        return f"WRONG routed what is illegal: {sorted(found - legal)}"
    if legal - found:
        reasons = {r.block: r.reason for r in routed.program.refused}
        return f"WRONG refused what is legal: { {b: reasons.get(b) for b in legal - found} }"
    if not torch.equal(routed(**inputs), dense):
        return "WRONG not bit-equal with all tokens"
    (frozen,) = dcr.freeze(routed, keep_ratio=0.5)
    half = frozen(**inputs)
    expected = model.reference(
        inputs["x"], inputs["t"], inputs.get("mask"), routed.routers, recipe.tokens // 2
    )
    if (half - expected).abs().max() > CLOSE * max(1.0, float(expected.abs().max())):
        return (
            f"WRONG output on half of the tokens: {float((half - expected).abs().max()):.1e}"
        )
    dcr.export([frozen], folder)
    made = load(folder, threads=1)(**{name: tensor.numpy() for name, tensor in inputs.items()})
    if np.abs(made - half.numpy()).max() > CLOSE * max(1.0, float(half.abs().max())):
        return "WRONG output of ONNX Runtime"
    return "routed"


def run(count: int, first: int = 0) -> dict[str, Any]:
    """Try `count` random models."""
    started = time.monotonic()
    verdicts: collections.Counter[str] = collections.Counter()
    wrong = []
    blocks = collections.Counter()
    for seed in range(first, first + count):
        recipe = draw(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = verdict(recipe, Path(folder) / "out")
            except Exception:  # noqa: BLE001 - that is what is looked for
                found = f"WRONG error: {traceback.format_exc(limit=-2)[-400:]}"
        verdicts[found.split()[0]] += 1
        blocks.update("illegal" if set(p) & set(ILLEGAL) else "legal" for p in recipe.pieces)
        if found.startswith("WRONG"):
            wrong.append(f"{recipe}: {found}")
    return {
        "models": count, "first_seed": first, "verdicts": dict(verdicts), "blocks": dict(blocks),
        "wrong": wrong, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.count, arguments.first), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
