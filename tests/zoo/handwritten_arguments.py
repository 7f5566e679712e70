"""Hand-written models: what blocks are given and what they return."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import zoo
from tests.zoo.handwritten_parts import (
    HEAD,
    HEADS,
    PATCH,
    SIDES,
    WIDTH,
    Block,
    Core,
    CrossAttention,
    Shell,
    Simple,
    TimeEmbedding,
    angles,
    randn,
    sample_inputs,
    sinusoid,
    text_states,
    turn_complex,
    turn_real,
)

Example = tuple[nn.Module, dict[str, Any]]


# --------------------------------------------------------------------- order of the arguments


class LabelEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(11, WIDTH)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train:
            drop = torch.rand(labels.shape[0], device=labels.device) < 0.1
            labels = torch.where(drop, 10, labels)
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Twice the channels: noise and its variance (``learn_sigma``)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, PATCH * PATCH * 8)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = self.norm_final(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return self.linear(x)


class OriginalDiT(Shell):
    """The calling order of facebookresearch/DiT: ``model(x, t, y)``, ``block(x, c)``."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.y_embedder, self.final_layer = LabelEmbedder(), FinalLayer()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.tokens(x)
        c = self.time(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x: Tensor) -> Tensor:
        h = w = int(x.shape[1] ** 0.5)
        x = x.reshape(shape=(x.shape[0], h, w, PATCH, PATCH, 8))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], 8, h * PATCH, w * PATCH))


@zoo("original_dit", "handwritten")
def original_dit(size: int) -> Example:
    return OriginalDiT(size), sample_inputs(size, y=torch.tensor([1, 7]))


class ConditionFirstBlock(Core):
    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        return self.run(x, c)


class ConditionFirst(Simple):
    """``block(c, x)``, c (B, C)."""

    def step(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        return block(c, x)


@zoo("condition_first", "handwritten")
def condition_first(size: int) -> Example:
    return ConditionFirst(size, ConditionFirstBlock), sample_inputs(size)


class TextFirstBlock(Core):
    def __init__(self) -> None:
        super().__init__()
        self.cross = CrossAttention()

    def forward(self, text: Tensor, x: Tensor, c: Tensor) -> Tensor:
        return self.run(x + self.cross(x, text), c)


class TextFirst(Simple):
    """Cross-attention, ``block(text, x, c)``, text (B, 5, C)."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(text, x, c)
        return self.image(x)


@zoo("text_first_argument", "handwritten")
def text_first_argument(size: int) -> Example:
    return TextFirst(size, TextFirstBlock), sample_inputs(size, text=text_states())


class ConditionTokensBlock(Core):
    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        return self.run(x, c)


class ConditionTokens(Simple):
    """``block(c, x)`` with c (B, N, C) from a map of conditions: it has the shape of the stream."""

    def forward(self, x: Tensor, t: Tensor, layout: Tensor) -> Tensor:  # type: ignore[override]
        x, c = self.tokens(x), self.time(t)[:, None] + layout
        for block in self.blocks:
            x = block(c, x)
        return self.image(x)


@zoo("condition_tokens_first", "handwritten")
def condition_tokens_first(size: int) -> Example:
    layout = randn(2, SIDES[size] ** 2, WIDTH, seed=1)
    return ConditionTokens(size, ConditionTokensBlock), sample_inputs(size, layout=layout)


class EmbeddingFirstBlock(Core):
    def __init__(self) -> None:
        super().__init__()
        self.reinject = nn.Linear(WIDTH, WIDTH)

    def forward(self, first: Tensor, x: Tensor, c: Tensor) -> Tensor:
        return self.run(x + self.reinject(first), c)


class EmbeddingFirst(Simple):
    """Each block sees the embedded patches again: ``block(patches, x, c)``; the residual is x's."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, c = self.tokens(x), self.time(t)
        x = first * 0.9
        for block in self.blocks:
            x = block(first, x, c)
        return self.image(x)


@zoo("embedding_first", "handwritten")
def embedding_first(size: int) -> Example:
    return EmbeddingFirst(size, EmbeddingFirstBlock), sample_inputs(size)


class KeywordBlock(Core):
    def __init__(self) -> None:
        super().__init__()
        self.cross = CrossAttention()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if kwargs.get("text") is not None:
            x = x + self.cross(x, kwargs["text"])
        table = kwargs.get("rope")
        rotate = None if table is None else (lambda q: turn_real(q, *table))
        return self.run(x, kwargs["c"], rotate=rotate)


class Keywords(Simple):
    """Everything but the stream comes through ``**kwargs``, a rotary table among it."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        x = self.tokens(x)
        table = torch.cat([angles(self.num_tokens)] * 2, dim=-1)
        more = {
            "c": self.time(t),
            "text": text,
            "rope": (table.cos(), table.sin()),
            "flag": None,
        }
        for block in self.blocks:
            x = block(x, **more)
        return self.image(x)


@zoo("keywords_block", "handwritten")
def keywords_block(size: int) -> Example:
    return Keywords(size, KeywordBlock), sample_inputs(size, text=text_states())


class NamedBlock(Core):
    def forward(self, temb: Tensor, hidden_states: Tensor) -> Tensor:
        return self.run(hidden_states, temb)


class Named(Simple):
    def step(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        return block(hidden_states=x, temb=c)


@zoo("all_by_keyword", "handwritten")
def all_by_keyword(size: int) -> Example:
    return Named(size, NamedBlock), sample_inputs(size)


# ------------------------------------------------------------------------------------- outputs


class TupleBlock(Core):
    """Returns a tuple as the layers of transformers do; `second` says what stands beside x."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.second = second

    def forward(self, x: Tensor, c: Tensor) -> tuple[Any, ...]:
        y = self.run(x, c)
        if self.second == "nothing":
            return (y,)
        if self.second == "none":
            return (y, None)
        q, k, _ = self.attention.qkv(self.norm(x)).chunk(3, dim=-1)
        return y, (q @ k.transpose(1, 2)).softmax(-1)  # attention weights (B, N, N)


class Tuples(Simple):
    def step(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        return block(x, c)[0]


@zoo("tuple_output", "handwritten")
def tuple_output(size: int) -> Example:
    return Tuples(size, lambda: TupleBlock("nothing")), sample_inputs(size)


@zoo("tuple_with_none", "handwritten")
def tuple_with_none(size: int) -> Example:
    return Tuples(size, lambda: TupleBlock("none")), sample_inputs(size)


@zoo("tuple_with_unused_weights", "handwritten")
def tuple_with_unused_weights(size: int) -> Example:
    """The attention weights are returned by every block and read by nobody."""
    return Tuples(size, lambda: TupleBlock("weights")), sample_inputs(size)


class ReadWeights(Simple):
    """The model's output has the attention weights in it, (B, N, N): K tokens cannot make them."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, c = self.tokens(x), self.time(t)
        seen = []
        for block in self.blocks:
            x, weights = block(x, c)
            seen.append(weights)
        return self.image(x), torch.stack(seen)


@zoo("tuple_with_read_weights", "handwritten", refused="output")
def tuple_with_read_weights(size: int) -> Example:
    return ReadWeights(size, lambda: TupleBlock("weights")), sample_inputs(size)


class DictBlock(Core):
    """A state in, the next state out, tensors and a number in it."""

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        x = self.run(state["streams"]["x"], state["c"])
        return {"c": state["c"], "depth": state["depth"] + 1, "streams": {"x": x}}


class Dicts(Simple):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        state = {"c": self.time(t), "depth": 0, "streams": {"x": self.tokens(x)}}
        for block in self.blocks:
            state = block(state)
        return self.image(state["streams"]["x"])


@zoo("dict_in_and_out", "handwritten")
def dict_in_and_out(size: int) -> Example:
    return Dicts(size, DictBlock), sample_inputs(size)


# ------------------------------------------------------------------- modulation of every token


class ModulationBlock(Core):
    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return x + gate * self.mlp(self.norm(x))


class Modulated(Simple):
    """Shift, scale and gate of shape (B, N, C), made once outside the blocks."""

    def __init__(self, size: int) -> None:
        super().__init__(size, ModulationBlock)
        self.make = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, t: Tensor, region: Tensor) -> Tensor:  # type: ignore[override]
        x = self.tokens(x)
        c = self.time(t)[:, None] * region[..., None]
        shift, scale, gate = self.make(c).chunk(3, dim=-1)
        for block in self.blocks:
            x = block(x, shift, scale, 1 + gate)
        return self.image(x)


@zoo("per_token_modulation", "handwritten")
def per_token_modulation(size: int) -> Example:
    return Modulated(size), sample_inputs(size, region=randn(2, SIDES[size] ** 2, seed=1))


@zoo("timestep_per_token", "handwritten")
def timestep_per_token(size: int) -> Example:
    """Diffusion forcing: ``t`` is (B, N), so the condition is (B, N, C)."""
    inputs = sample_inputs(size)
    inputs["t"] = 500 + 200 * randn(2, SIDES[size] ** 2, seed=1)
    return Simple(size), inputs


class ModulationStackBlock(Core):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:  # table (6, B, N, C)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table
        x = x + (1 + gate_1) * self.attention(self.norm(x) * (1 + scale_1) + shift_1)
        return x + (1 + gate_2) * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)


class ModulationStack(Simple):
    """Six modulations of every token in one tensor (6, B, N, C): the batch is not on axis 0."""

    def __init__(self, size: int) -> None:
        super().__init__(size, ModulationStackBlock)
        self.make = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, t: Tensor, region: Tensor) -> Tensor:  # type: ignore[override]
        x = self.tokens(x)
        c = self.time(t)[:, None] * region[..., None]
        table = self.make(c).unflatten(-1, (6, -1)).permute(2, 0, 1, 3)
        for block in self.blocks:
            x = block(x, table)
        return self.image(x)


@zoo("modulation_stack", "handwritten")
def modulation_stack(size: int) -> Example:
    return ModulationStack(size), sample_inputs(
        size, region=randn(2, SIDES[size] ** 2, seed=1)
    )


# --------------------------------------------------------------------------------------- masks


class MaskBlock(Core):
    """`form` says how a mask is spread over heads and queries."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        if self.form == "keys":
            mask = mask[:, None, None, :]
        return self.run(x, c, mask=mask)


class Masked(Simple):
    def __init__(self, size: int, form: str = "as it is") -> None:
        super().__init__(size, lambda: MaskBlock(form))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c, mask)
        return self.image(x)


def key_mask(size: int) -> Tensor:
    """(B, N) bool, about two of three keys allowed, others in each sample."""
    mask = randn(2, SIDES[size] ** 2, seed=3) > -0.4
    mask[:, 0] = True
    return mask


@zoo("mask_of_keys", "handwritten")
def mask_of_keys(size: int) -> Example:
    return Masked(size, "keys"), sample_inputs(size, mask=key_mask(size))


@zoo("mask_of_pairs", "handwritten")
def mask_of_pairs(size: int) -> Example:
    """(B, 1, N, N): a token may always look at itself."""
    n = SIDES[size] ** 2
    mask = (randn(2, 1, n, n, seed=3) > 0) | torch.eye(n, dtype=torch.bool)
    return Masked(size), sample_inputs(size, mask=mask)


@zoo("mask_of_pairs_without_batch", "handwritten")
def mask_of_pairs_without_batch(size: int) -> Example:
    """(N, N), added to the scores of every sample and head."""
    n = SIDES[size] ** 2
    return Masked(size), sample_inputs(size, mask=randn(n, n, seed=3))


@zoo("bias_of_heads", "handwritten")
def bias_of_heads(size: int) -> Example:
    """(1, H, N, N): a position bias made once, as with ALiBi in two dimensions."""
    n = SIDES[size] ** 2
    return Masked(size), sample_inputs(size, mask=randn(1, HEADS, n, n, seed=3))


# ------------------------------------------------------------------------------- rotary tables


class RopeBlock(Core):
    """`form` says how its tables broadcast against (B, H, L, D)."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, c: Tensor, rope: Any) -> Tensor:
        return self.run(x, c, rotate=lambda q: self.turn(q, rope))

    def turn(self, q: Tensor, rope: Any) -> Tensor:
        if self.form == "real":  # (N, D) each
            return turn_real(q, rope[0], rope[1])
        if self.form == "real, batch":  # (B, N, D) each
            return turn_real(q, rope[0][:, None], rope[1][:, None])
        if self.form == "complex":  # (N, D / 2)
            return turn_complex(q, rope)
        if self.form == "complex, batch":  # (B, N, D / 2)
            return turn_complex(q, rope[:, None])
        if self.form == "matrices":  # (B, 1, N, D / 2, 2, 2)
            pairs = q.unflatten(-1, (-1, 1, 2))
            return (rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]).flatten(-2)
        # positions (B, N)
        table = rope[..., None] * torch.tensor([1.0, 0.4, 0.15, 0.05]).to(q)
        table = torch.cat([table, table], dim=-1)[:, None]
        return turn_real(q, table.cos(), table.sin())


class Rope(Simple):
    def __init__(self, size: int, form: str, stacked: bool = False) -> None:
        super().__init__(size, lambda: RopeBlock(form))
        self.form, self.stacked = form, stacked
        table = torch.polar(torch.ones(self.num_tokens, HEAD // 2), angles(self.num_tokens))
        self.register_buffer("freqs_cis", table, persistent=False)

    def forward(self, x: Tensor, t: Tensor, places: Tensor | None = None) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        table = self.table(places)
        for block in self.blocks:
            x = block(x, c, rope=table)
        return self.image(x)

    def table(self, places: Tensor | None) -> Any:
        if self.form == "positions":
            return places
        if self.form == "complex":
            return self.freqs_cis
        if places is None:
            flat = torch.cat([angles(self.num_tokens)] * 2, dim=-1)
            pair = (flat.cos(), flat.sin())
            return torch.stack(pair) if self.stacked else pair
        half = places[..., None] * torch.tensor([1.0, 0.4, 0.15, 0.05])
        if self.form == "complex, batch":
            return torch.polar(torch.ones_like(half), half)
        if self.form == "matrices":
            cos, sin = half.cos(), half.sin()
            return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[:, None]
        whole = torch.cat([half, half], dim=-1)
        return whole.cos(), whole.sin()


def places(size: int, kind: torch.dtype = torch.float32) -> Tensor:
    """(B, N): where each token of each sample is."""
    n = SIDES[size] ** 2
    return torch.stack([torch.arange(n), n + 2 * torch.arange(n)]).to(kind)


@zoo("rope_real", "handwritten")
def rope_real(size: int) -> Example:
    return Rope(size, "real"), sample_inputs(size)


@zoo("rope_real_stacked", "handwritten")
def rope_real_stacked(size: int) -> Example:
    """One tensor (2, N, D): cos and sin stand where a batch of 2 would."""
    return Rope(size, "real", stacked=True), sample_inputs(size)


@zoo("rope_real_batch", "handwritten")
def rope_real_batch(size: int) -> Example:
    return Rope(size, "real, batch"), sample_inputs(size, places=places(size))


@zoo("rope_complex", "handwritten")
def rope_complex(size: int) -> Example:
    """A complex64 buffer of the model."""
    return Rope(size, "complex"), sample_inputs(size)


@zoo("rope_complex_batch", "handwritten")
def rope_complex_batch(size: int) -> Example:
    return Rope(size, "complex, batch"), sample_inputs(size, places=places(size))


@zoo("rope_matrices", "handwritten")
def rope_matrices(size: int) -> Example:
    """Matrices of 2 x 2 per token and frequency, as in the FLUX repository."""
    return Rope(size, "matrices"), sample_inputs(size, places=places(size))


@zoo("position_numbers", "handwritten")
def position_numbers(size: int) -> Example:
    """The block is given whole numbers (B, N) and makes its own rotary table."""
    return Rope(size, "positions"), sample_inputs(size, places=places(size, torch.int64))


# ----------------------------------------------------------------------------- types of numbers


class OwnTimeBlock(Core):
    """Embeds the raw timestep itself, in float32 whatever the block computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbedding()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time.second(F.silu(self.time.first(sinusoid(t.to(torch.float32)))))
        return self.run(x, c)


class OwnTime(Simple):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x, t)
        return self.image(x)


@zoo("float32_inside", "handwritten")
def float32_inside(size: int) -> Example:
    return OwnTime(size, OwnTimeBlock), sample_inputs(size)


@zoo("bfloat16", "handwritten")
def bfloat16(size: int) -> Example:
    """Weights and inputs in bfloat16. One block: after it, rounding would change who is kept."""
    inputs = sample_inputs(size)
    return Simple(size, depth=1).bfloat16(), {name: t.bfloat16() for name, t in inputs.items()}
