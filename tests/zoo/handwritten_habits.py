"""Hand-written models: ways to write a layer that look ordinary to their author and are not to a tracer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo import zoo
from tests.zoo.handwritten_parts import (
    HEADS,
    WIDTH,
    Block,
    Core,
    Shell,
    Simple,
    sample_inputs,
)

Example = tuple[nn.Module, dict[str, Any]]


class Encoder(Shell):
    """PyTorch's own encoder, whose layers are one fused operator in evaluation mode without gradients."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        # nested tensors are for padded text; PyTorch warns that it cannot use them here
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.image(self.encoder(self.tokens(x) + self.time(t)[:, None]))


@zoo("torch_encoder", "handwritten")
def torch_encoder(size: int) -> Example:
    return Encoder(size), sample_inputs(size)


class MultiheadBlock(Core):
    """``nn.MultiheadAttention``, which returns a tuple and has a fused path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.norm(x) + c[:, None]
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


@zoo("multihead_attention", "handwritten")
def multihead_attention(size: int) -> Example:
    return Simple(size, MultiheadBlock), sample_inputs(size)


class UnitLinear(nn.Module):
    """Rows of length one, made at every call and, while training, written back (EDM2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1))
        return F.linear(x, F.normalize(self.weight, dim=1))


class MagnitudeBlock(Block):
    """Streams keep their size: pixel norm, interpolation in the place of a sum, clipping at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            UnitLinear(WIDTH, 2 * WIDTH), nn.SiLU(), UnitLinear(2 * WIDTH, WIDTH)
        )
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1) * WIDTH**0.5
        x = torch.lerp(x, self.attention(x), 0.3) / (0.7**2 + 0.3**2) ** 0.5
        y = self.mlp(x * (1 + self.gain * c[:, None]))
        return (torch.lerp(x, y, 0.3) / (0.7**2 + 0.3**2) ** 0.5).clamp(-256, 256)


@zoo("magnitude_preserving", "handwritten")
def magnitude_preserving(size: int) -> Example:
    return Simple(size, MagnitudeBlock), sample_inputs(size)


class NormalisedBlock(Block):
    """Weights that a parametrization computes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp.first = parametrizations.weight_norm(self.mlp.first)
        self.mlp.second = parametrizations.spectral_norm(self.mlp.second)


@zoo("parametrized_weights", "handwritten")
def parametrized_weights(size: int) -> Example:
    return Simple(size, NormalisedBlock), sample_inputs(size)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class FusedModulationBlock(Core):
    """The modulation is compiled by TorchScript, as it was done for speed before torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate = torch.jit.script(modulate)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, gate_2, _, _ = self.modulation(F.silu(c)).chunk(6, dim=-1)
        x = x + gate[:, None] * self.attention(self.modulate(self.norm(x), shift, scale))
        return x + gate_2[:, None] * self.mlp(self.norm(x))


@zoo("scripted_modulation", "handwritten")
def scripted_modulation(size: int) -> Example:
    return Simple(size, FusedModulationBlock), sample_inputs(size)


class InPlaceBlock(Core):
    """Writes into tensors of its own, to save memory."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, gate_2, _, _ = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        y = x + gate * self.attention(self.norm(x).mul_(1 + scale).add_(shift))
        y += gate_2 * self.mlp(self.norm(y))
        return y


@zoo("own_tensors_in_place", "handwritten")
def own_tensors_in_place(size: int) -> Example:
    return Simple(size, InPlaceBlock), sample_inputs(size)


class StreamInPlaceBlock(Block):
    """Writes into the stream that it was given."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x += self.attention(self.norm(x) + c[:, None])
        x += self.mlp(self.norm(x))
        return x


@zoo("stream_in_place", "handwritten", refused="writes to its input")
def stream_in_place(size: int) -> Example:
    return Simple(size, StreamInPlaceBlock), sample_inputs(size)


class MappedBlock(Core):
    """A function of one sample, mapped over the batch."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        def of_one(tokens: Tensor, condition: Tensor) -> Tensor:
            return self.mlp(F.layer_norm(tokens, (WIDTH,)) + condition)

        x = x + self.attention(self.norm(x))
        return x + torch.vmap(of_one)(x, c)


@zoo("mapped_over_the_batch", "handwritten")
def mapped_over_the_batch(size: int) -> Example:
    return Simple(size, MappedBlock), sample_inputs(size)


class Scaled(torch.autograd.Function):
    """x * s, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, s = ctx.saved_tensors
        return upstream[0] * s, (upstream[0] * x).sum().reshape(s.shape)


class OwnFunctionBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def mix(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.scale)


@zoo("own_autograd_function", "handwritten")
def own_autograd_function(size: int) -> Example:
    return Simple(size, OwnFunctionBlock), sample_inputs(size)
