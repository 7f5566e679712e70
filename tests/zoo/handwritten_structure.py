"""Hand-written models: how streams run, how blocks are kept, and what the model returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo import zoo
from tests.zoo.handwritten_parts import (
    CHANNELS,
    HEAD,
    SIDES,
    TEXT,
    WIDTH,
    Attention,
    Block,
    Core,
    Mlp,
    Shell,
    Simple,
    angles,
    randn,
    sample_inputs,
    sinusoid,
    text_states,
    turn_complex,
)

Example = tuple[nn.Module, dict[str, Any]]


# ------------------------------------------------------------------------- more than one stream


class Registers(Simple):
    """`count` learned tokens stand in front of the image tokens and are read at the end."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__(size)
        self.registers = nn.Parameter(torch.randn(1, count, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, count = self.time(t), self.registers.shape[1]
        front = self.registers.expand(x.shape[0], -1, -1)
        x = torch.cat([front, self.tokens(x)], dim=1)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x[:, count:] + x[:, :1])


@zoo("class_token", "handwritten")
def class_token(size: int) -> Example:
    return Registers(size, 1), sample_inputs(size)


@zoo("register_tokens", "handwritten")
def register_tokens(size: int) -> Example:
    return Registers(size, 3), sample_inputs(size)


class OneStream(Simple):
    """Text and image in one sequence."""

    def __init__(self, size: int, order: str) -> None:
        super().__init__(size)
        self.order = order

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        image, c = self.tokens(x), self.time(t)
        n, text_first = image.shape[1], self.order == "text first"
        x = torch.cat([text, image] if text_first else [image, text], dim=1)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x[:, -n:] if text_first else x[:, :n])


@zoo("joint_text_first", "handwritten")
def joint_text_first(size: int) -> Example:
    return OneStream(size, "text first"), sample_inputs(size, text=text_states())


@zoo("joint_image_first", "handwritten")
def joint_image_first(size: int) -> Example:
    return OneStream(size, "image first"), sample_inputs(size, text=text_states())


class JointMaskBlock(Core):
    def forward(self, x: Tensor, c: Tensor, mask: Tensor, rope: Tensor) -> Tensor:
        return self.run(
            x, c, mask=mask[:, None, None, :], rotate=lambda q: turn_complex(q, rope[:, None])
        )


class JointMask(Shell):
    """Text first; a mask (B, L) and a complex table (B, L, D / 2) run along both."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.blocks = nn.ModuleList([JointMaskBlock() for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        image, c = self.tokens(x), self.time(t)
        stream = torch.cat([text, image], dim=1)
        seen = text_mask.new_ones(image.shape[:2])
        mask = torch.cat([text_mask, seen], dim=1)
        half = angles(stream.shape[1]).expand(x.shape[0], -1, -1)
        table = torch.polar(torch.ones_like(half), half * t[:, None, None] / 500)
        for block in self.blocks:
            stream = block(stream, c, mask, table)
        return self.image(stream[:, TEXT:])


@zoo("joint_with_mask_and_table", "handwritten")
def joint_with_mask_and_table(size: int) -> Example:
    text_mask = torch.arange(TEXT) < torch.tensor([[TEXT], [2]])
    return JointMask(size), sample_inputs(size, text=text_states(), text_mask=text_mask)


class DualBlock(nn.Module):
    """MM-DiT: two streams with weights of their own and one attention; returns (text, image)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv_x, self.qkv_text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out_x, self.out_text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_x, self.mlp_text = Mlp(), Mlp()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scale_x, scale_text = self.modulation(c)[:, None].chunk(2, dim=-1)
        parts = [
            make(self.norm(stream) * (1 + scale)).unflatten(-1, (3, -1, HEAD))
            for make, stream, scale in (
                (self.qkv_text, text, scale_text),
                (self.qkv_x, x, scale_x),
            )
        ]
        q, k, v = torch.cat(parts, dim=1).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = turn_complex(q, rope), turn_complex(k, rope)
        weights = (q @ k.transpose(-1, -2) * HEAD**-0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        text = text + self.out_text(mixed[:, : text.shape[1]])
        x = x + self.out_x(mixed[:, text.shape[1] :])
        return text + self.mlp_text(self.norm(text)), x + self.mlp_x(self.norm(x))


class Dual(Simple):
    """The text stream is part of the model's output, so that a wrong one shows."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            text, x = block(x, text, c)
        return self.image(x), text


@zoo("dual_streams", "handwritten")
def dual_streams(size: int) -> Example:
    return Dual(size, DualBlock), sample_inputs(size, text=text_states())


@zoo("dual_streams_of_equal_length", "handwritten")
def dual_streams_of_equal_length(size: int) -> Example:
    """As many text tokens as image tokens: shapes cannot tell the two streams apart."""
    text = randn(2, SIDES[size] ** 2, WIDTH, seed=1)
    return Dual(size, DualBlock), sample_inputs(size, text=text)


class SingleBlock(Core):
    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        return self.run(x, c, rotate=lambda q: turn_complex(q, rope))


class DualThenSingle(Shell):
    """FLUX: dual-stream blocks, then one joint stream; a table (text + N, D / 2) for both."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.double_blocks = nn.ModuleList([DualBlock()])
        self.single_blocks = nn.ModuleList([SingleBlock(), SingleBlock()])

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        half = angles(x.shape[1] + text.shape[1])
        rope = torch.polar(torch.ones_like(half), half)
        for block in self.double_blocks:
            text, x = block(x, text, c, rope=rope)
        x = torch.cat([text, x], dim=1)
        for block in self.single_blocks:
            x = block(x, c, rope=rope)
        return self.image(x[:, text.shape[1] :])


@zoo("dual_then_single", "handwritten")
def dual_then_single(size: int) -> Example:
    return DualThenSingle(size), sample_inputs(size, text=text_states())


class ResidualPairBlock(Core):
    """The fused-norm style: (hidden, residual) in, (hidden, residual) out."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + hidden
        return self.mlp(self.norm(residual + self.attention(self.norm(residual)))), residual


class ResidualPair(Simple):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        residual = c[:, None] * x
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.image(x + residual)


@zoo("hidden_and_residual", "handwritten", refused="2 image streams")
def hidden_and_residual(size: int) -> Example:
    return ResidualPair(size, ResidualPairBlock), sample_inputs(size)


# ---------------------------------------------------------------------------------- long skips


class SkipBlock(Core):
    """U-ViT and HunyuanDiT: the skip is joined by concatenation inside the block."""

    def __init__(self, has_skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * WIDTH, WIDTH) if has_skip else None

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        return self.run(x, c)


class SkipInside(Shell):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.down = nn.ModuleList([SkipBlock(False) for _ in range(2)])
        self.up = nn.ModuleList([SkipBlock(True) for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        skips = []
        for block in self.down:
            x = block(x, c)
            skips.append(x)
        for block in self.up:
            x = block(x, c, skip=skips.pop())
        return self.image(x)


@zoo("long_skip_as_argument", "handwritten")
def long_skip_as_argument(size: int) -> Example:
    return SkipInside(size), sample_inputs(size)


class SkipOutside(Shell):
    """U-ViT with the time as a token in front; the skips are joined between the blocks."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.down, self.middle, self.up = (nn.ModuleList([Block()]) for _ in range(3))
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t)
        first = x = torch.cat([c[:, None], self.tokens(x)], dim=1)
        x = skip = self.down[0](x, c)
        x = self.middle[0](x, c)
        x = self.up[0](self.join(torch.cat([x, skip], dim=-1)), c)
        return self.image(x[:, 1:] + first[:, 1:])


@zoo("long_skip_outside", "handwritten")
def long_skip_outside(size: int) -> Example:
    return SkipOutside(size), sample_inputs(size)


# -------------------------------------------------------------------------------------- stages


def halve(x: Tensor, side: int) -> Tensor:
    """(B, N, C) -> (B, N / 4, 4 C)."""
    grid = x.unflatten(1, (side // 2, 2, side // 2, 2))
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def double(x: Tensor, side: int) -> Tensor:
    """(B, N / 4, 4 C) -> (B, N, C)."""
    grid = x.unflatten(1, (side // 2, side // 2)).unflatten(-1, (2, 2, -1))
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)


class Stages(Shell):
    """N tokens, then N / 4 wider ones, then N again."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.outer = nn.ModuleList([Block(), Block()])
        self.inner = nn.ModuleList([Block(32, 4), Block(32, 4)])
        self.merge, self.spread = nn.Linear(4 * WIDTH, 32), nn.Linear(32, 4 * WIDTH)
        self.widen = nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        x = self.outer[0](x, c)
        small, wide = self.merge(halve(x, self.side)), self.widen(c)
        for block in self.inner:
            small = block(small, wide)
        x = x + double(self.spread(small), self.side)
        return self.image(self.outer[1](x, c))


@zoo("stages_of_lists", "handwritten")
def stages_of_lists(size: int) -> Example:
    return Stages(size), sample_inputs(size)


class Stage(nn.Module):
    """Two blocks, and the merging of 2 x 2 tokens after them: not one block of the paper's kind."""

    def __init__(self, width: int, heads: int, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(2)])
        self.merge = nn.Linear(4 * width, width) if merges else None

    def forward(self, x: Tensor, c: Tensor, side: int) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x if self.merge is None else self.merge(halve(x, side))


class StagesInList(Shell):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.stages = nn.ModuleList([Stage(WIDTH, 3, True), Stage(WIDTH, 3, False)])
        self.spread = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        small = self.stages[1](self.stages[0](x, c, self.side), c, self.side // 2)
        return self.image(x + double(self.spread(small), self.side))


@zoo("stages_of_modules", "handwritten")
def stages_of_modules(size: int) -> Example:
    """The outermost list holds stages; the blocks are inside of them."""
    return StagesInList(size), sample_inputs(size)


# ------------------------------------------------------------------------- how blocks are kept


class Looped(Simple):
    """One block, run three times."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for _ in range(3):
            x = self.blocks[0](x, c)
        return self.image(x)


@zoo("one_block_called_often", "handwritten", refused="called 3 times")
def one_block_called_often(size: int) -> Example:
    return Looped(size, depth=1), sample_inputs(size)


class SharedEnds(Simple):
    """First and last block are the same module, and the list holds it twice."""

    def __init__(self, size: int) -> None:
        super().__init__(size, depth=3)
        self.blocks[2] = self.blocks[0]


@zoo("shared_ends", "handwritten")
def shared_ends(size: int) -> Example:
    return SharedEnds(size), sample_inputs(size)


class Named(Shell):
    """A ModuleDict, in another running order than that of its keys."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.blocks = nn.ModuleDict({"last": Block(), "first": Block()})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        return self.image(self.blocks["last"](self.blocks["first"](x, c), c))


@zoo("module_dict", "handwritten")
def module_dict(size: int) -> Example:
    return Named(size), sample_inputs(size)


class PairBlock(Core):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, c = pair
        return self.run(x, c), c


class Chain(Shell):
    """A Sequential that is called as a whole; stream and condition go through it as one tuple."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.body = nn.Sequential(PairBlock(), PairBlock())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.image(self.body((self.tokens(x), self.time(t)))[0])


@zoo("sequential_of_pairs", "handwritten")
def sequential_of_pairs(size: int) -> Example:
    return Chain(size), sample_inputs(size)


class PlainBlock(Core):
    """The condition is added to the tokens before the first block, as in the first ViT DiTs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Whole(nn.Sequential):
    """The model is a Sequential itself: embedding, blocks, head."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        embed, *blocks, head = self
        x = embed(x) + sinusoid(t, WIDTH)[:, None]
        for block in blocks:
            x = block(x)
        return head(x)


class Patches(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.shell = nn.Conv2d(CHANNELS, WIDTH, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, SIDES[size] ** 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.shell(x).flatten(2).transpose(1, 2) + self.position


class Pixels(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.up = side, nn.ConvTranspose2d(WIDTH, CHANNELS, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.transpose(1, 2).unflatten(2, (self.side, self.side)))


@zoo("model_is_a_sequential", "handwritten")
def model_is_a_sequential(size: int) -> Example:
    model = Whole(Patches(size), PlainBlock(), PlainBlock(), Pixels(SIDES[size]))
    return model, sample_inputs(size)


class Nested(Shell):
    """Lists in lists: ``self.levels[i][j]``."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        lists = [[Block(), Block()], [Block()]]
        self.levels = nn.ModuleList([nn.ModuleList(blocks) for blocks in lists])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for level in self.levels:
            for block in level:
                x = block(x, c)
        return self.image(x)


@zoo("nested_lists", "handwritten")
def nested_lists(size: int) -> Example:
    return Nested(size), sample_inputs(size)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


class ByProperty(Shell):
    """``model.blocks`` is a property over a list three modules deep."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.net = nn.Module()
        self.net.backbone = Backbone()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.backbone.layers

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x)


@zoo("list_by_property", "handwritten")
def list_by_property(size: int) -> Example:
    return ByProperty(size), sample_inputs(size)


class ByAttributes(Shell):
    """No container at all: ``block_0``, ``block_1``, and a property that lists them."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        for number in range(2):
            setattr(self, f"block_{number}", Block())

    @property
    def blocks(self) -> list[nn.Module]:
        return [getattr(self, f"block_{number}") for number in range(2)]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x)


@zoo("blocks_as_attributes", "handwritten")
def blocks_as_attributes(size: int) -> Example:
    return ByAttributes(size), sample_inputs(size)


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.inner(self.norm(x) + c[:, None])


class Branches(Shell):
    """``for attention, mlp in layers: x = attention(x) + x; ...``: the sum is the model's.

    A token that bypasses such a branch must leave the *stream* as it was: the branch adds nothing.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.layers = nn.ModuleList(
            [nn.ModuleList([PreNorm(Attention()), PreNorm(Mlp())]) for _ in range(2)]
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for attention, mlp in self.layers:
            x = attention(x, c) + x
            x = mlp(x, c) + x
        return self.image(x)


@zoo("branches_without_residual", "handwritten")
def branches_without_residual(size: int) -> Example:
    return Branches(size), sample_inputs(size)


# ----------------------------------------------------------------------- how the model is called


@dataclasses.dataclass
class Prediction:
    sample: Tensor
    condition: Tensor


class Returning(Simple):
    """Returns a dataclass that nobody told torch about."""

    def forward(self, x: Tensor, t: Tensor) -> Prediction:  # type: ignore[override]
        return Prediction(super().forward(x, t), self.time(t))


@zoo("dataclass_output", "handwritten")
def dataclass_output(size: int) -> Example:
    return Returning(size), sample_inputs(size)


class Checkpointed(Simple):
    """Every block under torch.utils.checkpoint, in evaluation mode too, as in the DiT repositories."""

    def step(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        def run(*inputs: Tensor) -> Tensor:
            return block(*inputs)

        return checkpoint(run, x, c, use_reentrant=False)


@zoo("gradient_checkpointing", "handwritten")
def gradient_checkpointing(size: int) -> Example:
    return Checkpointed(size), sample_inputs(size)


class Guided(Simple):
    """Classifier-free guidance inside: blocks see twice the batch of the call."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        x, c = self.tokens(x), self.time(t)
        x, c = torch.cat([x, x]), torch.cat([c + label, c])
        for block in self.blocks:
            x = block(x, c)
        with_label, without = self.image(x).chunk(2)
        return without + 3.0 * (with_label - without)


@zoo("guidance_inside", "handwritten")
def guidance_inside(size: int) -> Example:
    return Guided(size), sample_inputs(size, label=randn(2, WIDTH, seed=1))
