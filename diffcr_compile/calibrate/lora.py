"""Train low-rank adapters (Hu et al. 2021, by way of peft) instead of the weights themselves.

Adapters sit on the Linear layers of the routed blocks, those that nothing else uses. The base weights stay
the user's own and are never written to. At the end each adapter is merged into a new weight, so that
whatever comes after a calibration sees a plain model.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.calibrate.requires_grad import requires_grad_kept
from diffcr_compile.copied import copied
from diffcr_compile.errors import AccuracyError, EnvironmentMissingError, UsageError
from diffcr_compile.program import Program, run_flat

ADAPTER = "default"
MARKS = (f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}.")  # in the names of trained parameters
TRIAL_SIZE = 0.02  # of the numbers in B while it is tried whether adapters can be merged
# Merged and unmerged products are rounded differently; in half precision the merged weight itself is.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
HALF_TOLERANCE = 3e-2


def adapted_layers(program: Program) -> dict[str, nn.Linear]:
    """The Linear layers that get an adapter, by name: in routed blocks, and used by nothing else."""
    module = program.module
    inside = tuple(f"{spec.name}." for spec in program.blocks)
    # A weight may have several names: other modules, or the graph itself, read it too.
    names = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
        and name.startswith(inside)
        and not any(mark in f"{name}." for mark in MARKS)
        and names[id(layer.weight)] == 1
        and not program.reads_weights_of(name)
    }


@contextlib.contextmanager
def low_rank(program: Program, rank: int, seed: int) -> Iterator[None]:
    """Adapters are there while the context lasts; merged at its end, or gone if it fails.

    Args:
        program: ROUTED. Its blocks become copies that share the weights.
        rank: of the adapters.
        seed: of their first values.

    Raises:
        EnvironmentMissingError: peft is not installed.
        UsageError: there is no layer to adapt.
        AccuracyError: a block uses a weight in another way than its layer does.
    """
    originals = {spec.name: program.module.get_submodule(spec.name) for spec in program.blocks}
    try:
        _copy_blocks(program)
        with requires_grad_kept(program.module):  # peft freezes the base weights
            _add_adapters(program, rank, seed)
        _check_mergeable(program, seed)
        yield
        merge_adapters(program)
    except BaseException:
        for name, block in originals.items():
            program.module.set_submodule(name, block)
        raise


@torch.no_grad()
def merge_adapters(program: Program) -> None:
    """Replace every adapted layer by a Linear whose new weight is the base's plus the adapter's."""
    for name, layer in _adapters(program).items():
        base: nn.Linear = layer.get_base_layer()
        delta: Tensor = layer.get_delta_weight(ADAPTER)
        weight = nn.Parameter(
            (base.weight.float() + delta.float()).to(base.weight.dtype),
            requires_grad=base.weight.requires_grad,
        )
        shared: dict[int, Any] = {id(base.weight): weight, id(base.bias): base.bias}
        program.module.set_submodule(name, copied(base, shared))
    for spec in program.blocks:
        block = program.module.get_submodule(spec.name)
        if hasattr(block, "peft_config"):
            del block.peft_config


def _copy_blocks(program: Program) -> None:
    """Give a program its own block modules over the same weights."""
    module = program.module
    shared: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    for spec in program.blocks:
        module.set_submodule(spec.name, copied(module.get_submodule(spec.name), shared))


def _add_adapters(program: Program, rank: int, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise EnvironmentMissingError(
            "calibration.train is lora, which needs peft: pip install diffcr-compile[lora], or set "
            "calibration.train to router or all",
            code="DCR-E011",
        ) from error
    layers = adapted_layers(program)
    if not layers:
        raise UsageError(
            "calibration.train is lora, and no routed block has a Linear layer of its own. Set it to "
            "router or all.",
            code="DCR-U075",
        )
    for spec in program.blocks:
        inside = f"{spec.name}."
        mine = [re.escape(n.removeprefix(inside)) for n in layers if n.startswith(inside)]
        if mine:
            # one pattern, because peft takes a name in a list for all that end like it
            config = LoraConfig(
                r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="|".join(mine)
            )
            inject_adapter_in_model(config, program.module.get_submodule(spec.name), ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in _adapters(program).values():
            down: Tensor = layer.lora_A[ADAPTER].weight
            bound = down.shape[1] ** -0.5
            values = torch.rand(down.shape, generator=generator) * 2 * bound - bound
            down.copy_(values)
            layer.lora_B[ADAPTER].weight.zero_()


def _adapters(program: Program) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in program.module.named_modules()
        if hasattr(layer, "get_delta_weight") and ADAPTER in getattr(layer, "lora_A", {})
    }


@torch.no_grad()
def _check_mergeable(program: Program, seed: int) -> None:
    """With adapters that do something, a merged copy must give the same output."""
    generator = torch.Generator().manual_seed(seed + 1)
    ups: list[Tensor] = [a.lora_B[ADAPTER].weight for a in _adapters(program).values()]
    for up in ups:
        up.copy_(TRIAL_SIZE * torch.randn(up.shape, generator=generator))
    program.module.eval()
    found = run_flat(program, program.example)[0].float()
    trial = program.with_graph(program.copy_graph())
    _copy_blocks(trial)
    merge_adapters(trial)
    expected = run_flat(trial, program.example)[0]
    for up in ups:
        up.zero_()
    tolerance = TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    expected = expected.float()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise AccuracyError(
            "calibration.train is lora, and merged adapters change the model's output by "
            f"{error:.1e} of its largest value, expected at most {tolerance:.0e}: a block reads a "
            "Linear layer's weight instead of calling the layer. Set calibration.train to all or router.",
            code="DCR-Q011",
        )
