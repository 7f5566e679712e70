"""Captured and routed models, made once per session: capturing costs seconds, tests cost little.

What a fixture returns is shared. A test that sets kept tokens, training mode or weights restores
them, see ``keeping``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import diffcr_compile as dcr
from diffcr_compile.capture import capture
from diffcr_compile.legality import Findings, find_blocks
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.program import DiTGraph, Program, selector_name
from diffcr_compile.routing import Gate, TokenSelector
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from tests import models
from tests.offline import go_offline

# The graph runs the batch at once and in another token order (best first, not by position) than
# the slow loop, so sums are taken in another order: fp32 rounding, not a tolerance for mistakes.
# A single wrong token would be off by 0.1 and more.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--online", action="store_true", help="let tests use the network")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--online"):
        go_offline()


def flat(output: Any) -> list[Tensor]:
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with everything the compiler made of it."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    findings: Findings
    captured: Program
    routed: Program

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.routed.blocks]

    def schedule(self, column: Mapping[str, int]) -> TokenSchedule:
        """One bucket with these kept tokens."""
        num_tokens = {spec.name: spec.num_tokens for spec in self.routed.blocks}
        kept = {block: (tokens,) for block, tokens in column.items()}
        return TokenSchedule(kept, num_tokens, TimestepBuckets.even(1))

    def frozen(self, column: Mapping[str, int]) -> Program:
        steps = [FreezeKeptTokens(self.schedule(column), 0), RemoveFullBlocks()]
        return run_passes(self.routed, steps)

    def router_weights(self) -> dict[str, torch.Tensor]:
        """Block name -> weights (C,) of its linear router."""
        routers = self.routed.module.routers
        return {name: routers[name].score.weight.detach()[0].clone() for name in self.names}

    def selector(self, block: str) -> TokenSelector:
        module = self.routed.module.get_submodule(selector_name(block))
        assert isinstance(module, TokenSelector)
        return module


def make_case(name: str, example: models.Example) -> Case:
    model, inputs = example
    findings = find_blocks(model, (), inputs)
    captured = capture(model, (), inputs, findings.blocks, findings.refused, findings.sample)
    routed = run_passes(captured, [InsertTokenRouters()])
    return Case(name, model, inputs, findings, captured, routed)


@pytest.fixture(scope="session")
def cases() -> Callable[..., Case]:
    """``cases("dit")``: a model of tests/models.py by name, made at its first use."""
    made: dict[tuple[str, str], Case] = {}

    def get(name: str, gate: Gate = "straight_through") -> Case:
        if (name, gate) not in made and gate != "straight_through":
            plain = get(name)
            routed = run_passes(plain.captured, [InsertTokenRouters(gate=gate)])
            made[name, gate] = dataclasses.replace(plain, routed=routed)
        if (name, gate) not in made:
            factory = models.DIFFUSERS.get(name) or getattr(models, name)
            made[name, gate] = make_case(name, factory())
        return made[name, gate]

    return get


@functools.cache
def _routed_tiny_dit() -> DiTGraph:
    return dcr.route(*models.tiny_dit())


def routed_tiny_dit() -> DiTGraph:
    """A routed model of one's own, to train: to copy one takes a hundredth of the time that routing does."""
    return copy.deepcopy(_routed_tiny_dit())


@contextlib.contextmanager
def keeping(
    case: Case, column: Mapping[str, int], *, training: bool = False
) -> Iterator[None]:
    """The ROUTED program of `case` keeps `column` tokens while the context lasts."""
    modules = dict(case.routed.module.named_modules()).values()
    modes = [(module, module.training) for module in modules]
    try:
        for block, kept in column.items():
            case.selector(block).keep(kept)
        case.routed.module.train(training)
        yield
    finally:
        for spec in case.routed.blocks:
            case.selector(spec.name).keep(spec.num_tokens)
        for module, mode in modes:
            module.training = mode
        case.model.zero_grad(set_to_none=True)
        for router in case.routed.module.routers.values():
            router.zero_grad(set_to_none=True)
