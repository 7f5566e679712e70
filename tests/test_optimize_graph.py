"""The optimiser that every exported graph goes through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import onnxscript.optimizer
import pytest

from diffcr_compile.export import onnx_model
from diffcr_compile.export.onnx_model import export_graph, onnx_from_program
from diffcr_compile.export.optimize_graph import optimize_graph
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.open_kept_tokens import OpenKeptTokens
from diffcr_compile.program import Program
from tests import models
from tests.conftest import Case, make_case


def opened(case: Case) -> Program:
    half = {spec.name: spec.num_tokens // 2 for spec in case.routed.blocks}
    return run_passes(case.frozen(half), [OpenKeptTokens(half)])


def function_calls(work: Callable[[], Any]) -> int:
    """How many Python functions run: unlike seconds, the same on every machine."""
    found = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("name", ["plain", "dit", "pixart", "flux"])
def test_graphs_are_those_of_torchs_own_optimiser(
    cases: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program = opened(cases(name))
    mine = onnx_from_program(program)
    monkeypatch.setattr(onnx_model, "optimize_graph", onnxscript.optimizer.optimize_ir)
    theirs = onnx_from_program(program)
    assert mine.SerializeToString(deterministic=True) == theirs.SerializeToString(
        deterministic=True
    )


def test_work_grows_linearly_with_the_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the second doubling of the blocks adds is twice what the first adds; torch's own adds 3.1 times."""
    calls: list[int] = []
    monkeypatch.setattr(
        onnx_model,
        "optimize_graph",
        lambda model: calls.append(function_calls(lambda: optimize_graph(model))),
    )
    programs = [
        make_case(f"{depth} blocks", models.plain(depth=depth)).captured
        for depth in (4, 8, 16)
    ]
    for program in [programs[0], *programs]:  # the first fills caches
        export_graph(program)
    _, once, twice, four_times = calls
    assert (four_times - twice) / (twice - once) < 2.2
