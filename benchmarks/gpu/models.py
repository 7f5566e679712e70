"""Untrained DiTs of any size, routed and frozen; what they cost is what trained ones cost.

The choice of tokens must not hang on rounding, or float16 and float32 would keep other tokens and nothing
could be compared: channel 0 of the position table says which quarter of the tokens one belongs to (tokens
are dealt to quarters at random), the patch embedding leaves it alone, and routers read nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, fx, nn

import diffcr_compile as dcr
from diffcr_compile.budgets import cost_table
from diffcr_compile.capture import capture
from diffcr_compile.config import RoutingConfig
from diffcr_compile.legality import Findings, find_blocks
from diffcr_compile.program import Program, with_batch
from diffcr_compile.schedule import cost_of
from diffcr_compile.stages import routed_program, uniform_schedule

PATCH, CHANNELS, CLASSES, SEED = 2, 4, 10, 0
CAPTURED_BATCH = 2
# Quarters of the tokens are this far apart in channel 0; blocks move a channel by far less.
SPACING = 4.0
QUARTERS = 4
FEW_TOKENS = 64
HEAD_WIDTH = {1152: 72, 384: 64, 32: 16}  # DiT-XL, DiT-S, and one for the smoke test
DEPTH = {1152: 6, 384: 8, 32: 2}


@dataclasses.dataclass(frozen=True)
class Routed:
    """One model in float32 and in float16, with equal weights, routed.

    Attributes:
        dense: the model itself in float16.
        wide: ROUTED, float32.
        half: ROUTED, float16 but for the routers.
    """

    dense: nn.Module
    wide: Program
    half: Program

    @property
    def call(self) -> dict[str, Tensor]:
        """Arguments of a float16 call."""
        return dict(self.half.example)

    def macs_share(self, keep_ratio: float) -> float:
        """MACs of the compressed model over those of the dense one."""
        tokens = self.wide.blocks[0].num_tokens
        config = RoutingConfig(
            multiple_of=max(tokens // QUARTERS, 1), min_keep_ratio=1 / QUARTERS
        )
        costs = cost_table(self.wide, config)
        return cost_of(costs, uniform_schedule(self.wide, keep_ratio)) / costs.dense

    def for_batch(self, batch: int) -> Routed:
        """The same for another number of samples."""
        return Routed(self.dense, with_batch(self.wide, batch), with_batch(self.half, batch))


def frozen(routed: Program, keep_ratio: float) -> Program:
    """FROZEN with every block at one keep ratio; at 1.0 the dense graph without routers."""
    return dcr.freeze(routed.module, keep_ratio=keep_ratio)[0].program


def make_routed(tokens: int, width: int, device: str) -> Routed:
    """A DiT with `tokens` tokens of `width` channels, in both precisions."""
    wide = _new_model(tokens, width).half().float().to(device)  # weights that both can hold
    half = copy.deepcopy(wide).half()
    inputs = example_inputs(tokens, device)
    findings = _findings(width, device)
    blocks = tuple(dataclasses.replace(b, num_tokens=tokens) for b in findings.blocks)
    findings = dataclasses.replace(findings, blocks=blocks)
    narrow = {n: t.half() if t.is_floating_point() else t for n, t in inputs.items()}
    return Routed(half, _routed(wide, inputs, findings), _routed(half, narrow, findings))


@functools.cache
def _findings(width: int, device: str) -> Findings:
    """Which blocks may be routed, found at few tokens: it does not hang on their number, and costs memory."""
    model = _new_model(FEW_TOKENS, width).to(device)
    return find_blocks(model, (), example_inputs(FEW_TOKENS, device), granularity="block")


def example_inputs(tokens: int, device: str) -> dict[str, Tensor]:
    """Inputs by name; numbers that float16 holds too."""
    side = PATCH * round(tokens**0.5)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn((CAPTURED_BATCH, CHANNELS, side, side), generator=generator)
    inputs = {
        "hidden_states": noise.half().float(),
        "timestep": torch.tensor([999, 500]),
        "class_labels": torch.tensor([3, 7]),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _new_model(tokens: int, width: int) -> nn.Module:
    torch.manual_seed(SEED)
    model = DiTTransformer2DModel(
        num_attention_heads=width // HEAD_WIDTH[width],
        attention_head_dim=HEAD_WIDTH[width],
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=DEPTH[width],
        sample_size=PATCH * round(tokens**0.5),
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    ).eval()
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(SEED))
    quarter = (order * QUARTERS // tokens).float()  # (N,), a quarter of the tokens in each
    embed = model.pos_embed
    embed.pos_embed[..., 0] = SPACING * (quarter - (QUARTERS - 1) / 2)
    with torch.no_grad():
        embed.proj.weight[0].zero_()
        embed.proj.bias[0].zero_()
    return model


def _routed(model: nn.Module, inputs: dict[str, Tensor], findings: Findings) -> Program:
    captured = capture(model, (), inputs, findings.blocks, findings.refused, findings.sample)
    routed = routed_program(captured, RoutingConfig(), SEED)
    with torch.no_grad():
        for router in routed.module.routers.values():
            weight = router.get_parameter("score.weight")  # (1, C)
            weight.zero_()
            weight[0, 0] = 1.0
    return routed


def on_cpu(program: Program) -> Program:
    """A copy of a program with its weights, its example and the tensors that it makes on the CPU."""
    graph = program.copy_graph()
    to_cpu = functools.partial(fx.node.map_aggregate, fn=_cpu_device)
    modules: dict[str, Any] = {}
    for node in graph.nodes:
        node.args, node.kwargs = to_cpu(node.args), to_cpu(node.kwargs)
        if node.op == "call_module":
            modules[node.target] = copy.deepcopy(
                program.module.get_submodule(node.target)
            ).cpu()
        elif node.op == "get_attr":
            modules[node.target] = _tensor_on_cpu(program.module, node.target)
    example = {name: tensor.cpu() for name, tensor in program.example.items()}
    return program.with_graph(graph, modules, example=example)


def _cpu_device(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _tensor_on_cpu(owner: Any, target: str) -> Tensor:
    for part in target.split("."):
        owner = getattr(owner, part)
    tensor: Tensor = owner.detach().cpu()
    return (
        nn.Parameter(tensor, requires_grad=False)
        if isinstance(owner, nn.Parameter)
        else tensor
    )
