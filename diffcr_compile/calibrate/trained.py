"""What a calibration trains: which parameters, their optimizers, learning rates and moving averages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.calibrate.lora import MARKS
from diffcr_compile.calibrate.muon import StackedMuon
from diffcr_compile.calibrate.requires_grad import requires_grad_kept
from diffcr_compile.calibrate.sharded_tensors import alike, share_like, total_norm, whole
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.copied import copied
from diffcr_compile.errors import AccuracyError, UsageError
from diffcr_compile.program import DiTGraph, Program

WARMUP_STEPS = 20
LAST_RATE = 0.05  # of the learning rate, at the last step
BETAS = (0.9, 0.99)
LARGEST_NORM = 1.0  # gradients are clipped to this
SHOWN = 3
TRAINABLE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
REMEDY = "Lower calibration.lr_weights or lr_router, or set calibration.precision to fp32, and run again."


class TrainedParameters:
    """The trained parameters of a routed program, with all that a step does to them.

    Attributes:
        parameters: by name in the program's module.
        averages: the exponential moving average of each, which is what a calibration returns.
    """

    def __init__(self, program: Program, config: CalibrationConfig) -> None:
        self.config = config
        self.parameters = trained_parameters(program, config)
        routers = {id(p) for p in routing_parameters(program).values()}
        blocks = [spec.name for spec in program.blocks]
        self.optimizers = make_optimizers(self.parameters, config, blocks, routers)
        self.averages: dict[str, Tensor] = {}
        self.forget_averages()

    def forget_averages(self) -> None:
        """Start the moving averages anew from the present values."""
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
        """One optimizer step from the gradients that are there, which are cleared.

        Args:
            step: from 0; decides the learning rate.

        Raises:
            AccuracyError: a gradient is NaN or infinite; nothing was changed, and no gradient is left.
        """
        factor = rate_factor(step, self.config.steps)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients:  # routers have none where every block is skipped
            norm = total_norm(gradients)
            if not bool(norm.isfinite()):
                raise self._not_finite(step)
            for kind in alike(self.parameters.values()):
                nn.utils.clip_grads_with_norm_(kind, LARGEST_NORM, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.config.ema, (step + 1) / (step + 10))
        if self.parameters:
            with torch.no_grad():  # all at once: one by one they are many launches on a GPU
                own = alike(self.parameters.values())
                for averages, kind in zip(alike(self.averages.values()), own, strict=True):
                    torch._foreach_lerp_(averages, kind, 1 - decay)

    def _not_finite(self, step: int) -> AccuracyError:
        """Which gradients are not; they are cleared, because the next step would add to them."""
        bad = [
            name
            for name, p in self.parameters.items()
            if p.grad is not None and not bool(whole(p.grad).isfinite().all())
        ]
        for parameter in self.parameters.values():
            parameter.grad = None
        where = f"of {', '.join(bad[:SHOWN])}" if bad else "of all parameters together"
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        return AccuracyError(
            f"calibration step {step + 1}: the gradient {where}{more} is NaN or infinite. {REMEDY}",
            code="DCR-Q010",
        )

    @torch.no_grad()
    def take_averages(self) -> None:
        """Put the moving averages in place of the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on, as flat tensors; those of sharded parameters are sharded."""
        state = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"ema.{name}": average for name, average in self.averages.items()}
        for optimizer in self.optimizers:
            names = self._names_in(optimizer)
            for index, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    state[f"optimizer.{names[index]}.{key}"] = torch.as_tensor(value)
        return state

    def share(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank needs of a tensor of the state, which is whole: all of it, or a share as its parameter is one."""
        kind, _, rest = name.partition(".")
        parameter, _, key = rest.rpartition(".") if kind == "optimizer" else (rest, "", "")
        if parameter not in self.parameters or key == "step":  # which stays on the CPU
            return tensor
        return share_like(tensor, self.parameters[parameter])

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """The reverse of :meth:`state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weights.{name}"])
            self.averages[name] = share_like(state[f"ema.{name}"], parameter)
        entries: dict[str, dict[str, Tensor]] = {}  # by parameter
        for place, tensor in state.items():
            if place.startswith("optimizer."):
                name, _, key = place.removeprefix("optimizer.").rpartition(".")
                entries.setdefault(name, {})[key] = self.share(place, tensor)
        for optimizer in self.optimizers:
            names = enumerate(self._names_in(optimizer))
            found = {index: entries[name] for index, name in names if name in entries}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": found, "param_groups": groups})

    def _names_in(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in its own order."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def nothing_else_learns(module: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only `trained` get gradients while the context lasts: the others are the user's, and cost time."""
    wanted = {id(parameter) for parameter in trained}
    with requires_grad_kept(module) as parameters:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
        yield


def own_weights(module: DiTGraph) -> None:
    """Give a graph its own copy of every weight; weights that were shared inside it stay shared."""
    memo: dict[int, Any] = {}
    for name, child in list(module.named_children()):
        setattr(module, name, copied(child, memo))
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, copied(parameter, memo))


def routing_parameters(program: Program) -> dict[str, nn.Parameter]:
    """The parameters of all routers and shortcuts, by block and name."""
    module = program.module
    shortcuts = {f"{block}.shortcut": shortcut for block, shortcut in module.shortcuts.items()}
    return {
        f"{part}.{name}": parameter
        for part, owner in (*module.routers.items(), *shortcuts.items())
        for name, parameter in owner.named_parameters()
    }


def trained_parameters(program: Program, config: CalibrationConfig) -> dict[str, nn.Parameter]:
    """Those that ``calibration.train`` names."""
    if config.train == "ratio":
        return {}
    routers = {id(p) for p in routing_parameters(program).values()}
    adapters = MARKS if config.train == "lora" else ()
    return {
        name: parameter
        for name, parameter in program.module.named_parameters()
        if id(parameter) in routers
        or config.train == "all"
        or any(mark in name for mark in adapters)
    }


def check_precision(program: Program, config: CalibrationConfig) -> None:
    """Refuse to train numbers in which small steps are lost: half precision rounds them away, or overflows.

    Raises:
        UsageError: a parameter that would be trained is neither fp32 nor fp64.
    """
    coarse = {
        name: parameter.dtype
        for name, parameter in trained_parameters(program, config).items()
        if parameter.dtype not in TRAINABLE
    }
    if not coarse:
        return
    name, dtype = next(iter(coarse.items()))
    raise UsageError(
        f"calibration.train is {config.train}, and {len(coarse)} of the parameters that it trains are not fp32 ({name} is "
        f"{dtype}): steps as small as a fine-tune's are lost there. Call .float() on the model and give fp32 example "
        "inputs; calibration.precision: bf16 brings the speed back. Or set calibration.train to router.",
        code="DCR-U077",
    )


def learning_mode(module: DiTGraph) -> None:
    """Evaluation mode, in which the dense model gave its answers; only the selectors are in training mode.

    Dropout would teach a block that what it was given has an answer that belongs to something else: diffusers' DiT drops class labels in
    every block. Running statistics (batch norm) are buffers: the user's own, and no part of what a calibration saves.
    """
    module.eval()
    for selector in module.selectors.values():
        selector.train()


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * (LAST_RATE + (1 - LAST_RATE) * cosine)


def make_optimizers(
    trained: Mapping[str, nn.Parameter],
    config: CalibrationConfig,
    blocks: Sequence[str],
    routers: Set[int] = frozenset(),
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices inside the routed blocks.

    Args:
        trained: by name.
        config: which optimizer, and the learning rates.
        blocks: names of the routed blocks.
        routers: ids of the routers' parameters.
    """
    matrices: dict[int, nn.Parameter] = {}
    if config.optimizer == "muon":
        inside = tuple(f"{block}." for block in blocks)
        matrices = {
            id(p): p
            for name, p in trained.items()
            if p.ndim == 2 and name.startswith(inside) and id(p) not in routers
        }
    others = [p for p in trained.values() if id(p) not in routers | matrices.keys()]
    groups = [
        *_groups([p for p in trained.values() if id(p) in routers], config.lr_router),
        *_groups(others, config.lr_weights),
    ]
    made: list[torch.optim.Optimizer] = []
    if groups:
        made.append(torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0))
    if matrices:
        made.append(StackedMuon(_groups(list(matrices.values()), config.lr_weights)))
    return made


def _groups(parameters: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Groups of one rate; sharded parameters have one of their own, as an optimizer updates a group at once."""
    return [{"params": kind, "lr": rate, "base_lr": rate} for kind in alike(parameters)]
