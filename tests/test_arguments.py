"""What the public functions are given by mistake: said in words before any work, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffcr_compile as dcr
from diffcr_compile.arguments import settings_from
from diffcr_compile.config import CompileConfig, RoutingConfig
from diffcr_compile.errors import UsageError
from tests import models
from tests.conftest import routed_tiny_dit

CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "route, all settings": (
        lambda out: dcr.route(*models.tiny_dit(), CompileConfig()),  # type: ignore[arg-type]
        r"config is of type CompileConfig; expected RoutingConfig .*pass its section: config\.routing",
    ),
    "route, a number": (
        lambda out: dcr.route(*models.tiny_dit(), 4),  # type: ignore[arg-type]
        "config is of type int; expected RoutingConfig or a dict",
    ),
    "inspect, a misspelt setting": (
        lambda out: dcr.inspect(*models.tiny_dit(), {"bucket": 2}),
        r"no setting routing\.bucket.*buckets",
    ),
    "calibrate, a section": (
        lambda out: dcr.calibrate(routed_tiny_dit(), budget="60%", config=RoutingConfig()),  # type: ignore[arg-type]
        r"pass CompileConfig\(routing=config\)",
    ),
    "calibrate, name of a sampler": (
        lambda out: dcr.calibrate(routed_tiny_dit(), budget="60%", sampler="euler"),  # type: ignore[arg-type]
        "sampler is of type str; expected FlowEuler.*it lacks timesteps, start, step",
    ),
    "calibrate, conditions themselves": (
        lambda out: dcr.calibrate(
            routed_tiny_dit(), budget="60%", conditions={"class_labels": torch.zeros(1)}  # type: ignore[arg-type]
        ),
        "conditions is of type dict; expected a function of",
    ),
    "compile, until a stage that is none": (
        lambda out: dcr.compile(
            models.tiny_dit()[0], out, example_inputs=models.tiny_dit()[1], until="frozen"  # type: ignore[arg-type]
        ),
        "until is 'frozen'; expected one of calibrate, freeze, export",
    ),
    "compile, a sampler without a step": (
        lambda out: dcr.compile(
            models.tiny_dit()[0], out, example_inputs=models.tiny_dit()[1], sampler=object()  # type: ignore[arg-type]
        ),
        "sampler is of type object",
    ),
    "export, one graph": (
        lambda out: dcr.export(dcr.freeze(routed_tiny_dit(), keep_ratio=1.0)[0], out),  # type: ignore[arg-type]
        r"all the FROZEN graphs that dcr\.freeze\(\) returned.*got DiTGraph",
    ),
    "export, no graph": (lambda out: dcr.export([], out), "got nothing"),
    "export, another precision": (
        lambda out: dcr.export(
            dcr.freeze(routed_tiny_dit(), keep_ratio=1.0), out, precision="fp8"  # type: ignore[arg-type]
        ),
        "precision is 'fp8'; expected one of fp32, fp16, bf16, int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_another_object_than_is_taken_is_refused_in_words(case: str, tmp_path: Path) -> None:
    call, words = CALLS[case]
    with pytest.raises(UsageError, match=words):
        call(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_settings_are_an_object_a_dict_or_nothing() -> None:
    assert settings_from(None, CompileConfig) == CompileConfig()
    given = RoutingConfig(buckets=2)
    assert settings_from(given, RoutingConfig) is given
    assert settings_from({"buckets": 2}, RoutingConfig) == given
    assert settings_from({"routing": {"buckets": 2}}, CompileConfig).routing == given


def test_a_dict_of_settings_does_what_the_object_does() -> None:
    model, inputs = models.plain()
    routed = dcr.route(model, inputs, {"exclude": ["blocks.0"]})
    assert list(routed.routers) == ["blocks.1"]
