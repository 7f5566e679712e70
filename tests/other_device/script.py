"""Every stage with a model that does not lie on the CPU: ``script.py LIBRARY FOLDER``; prints what is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffcr_compile as dcr
from diffcr_compile.budgets import cost_table
from diffcr_compile.calibrate.samplers import FlowEuler
from diffcr_compile.config import make_config
from diffcr_compile.stages import sampling_states
from tests import models
from tests.conftest import flat
from tests.other_device.registered import register

SETTINGS: dict[str, Any] = {
    "routing": {"buckets": 2, "multiple_of": 8},
    "rollouts": {"trajectories": 8, "steps": 4, "batch": 4},
    "calibration": {"steps": 4, "batch": 4, "save_every": 2},
}


def main(library: str, folder: Path) -> None:
    device = register(library)
    model, inputs = models.tiny_dit()
    (expected,) = flat(half_kept(model, inputs)(**inputs))
    model = model.to(device)
    there = {name: tensor.to(device) for name, tensor in inputs.items()}
    assert next(model.parameters()).device == device
    config = make_config(SETTINGS)
    routed = dcr.route(model, there, config.routing)
    assert {p.device for p in routed.parameters()} == {device}
    assert cost_table(routed.program, config.routing).dense > 0
    print("route")
    frozen = half_kept(model, there)
    (found,) = flat(frozen(**there))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    print("freeze")
    calibrated(model, there, device)
    print("calibrate")
    exported(model, there, frozen, folder)
    print("export")


def half_kept(model: Any, inputs: dict[str, Tensor]) -> dcr.DiTGraph:
    (frozen,) = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    return frozen


def calibrated(model: Any, inputs: dict[str, Tensor], device: torch.device) -> None:
    """From rollouts, from the user's data on the CPU, with two bins; and the dry comparison of budgets."""
    data = [
        {**{n: t.cpu() for n, t in inputs.items()}, "timestep": torch.full((2,), value)}
        for value in (200.0, 400.0, 600.0, 800.0)
    ]
    two_bin = {**SETTINGS, "calibration": {**SETTINGS["calibration"], "estimator": "two_bin"}}
    for given, settings in ((None, SETTINGS), (data, two_bin)):
        config = make_config(settings)
        routed = dcr.route(model, inputs, config.routing)
        result = dcr.calibrate(routed, given, budget="60%", config=config)
        assert all(step["loss"] > 0 for step in result.history)
        assert {p.device for p in routed.parameters()} == {device}
        for graph in dcr.freeze(routed, result):
            assert bool(flat(graph(**inputs))[0].isfinite().all())
    assert dcr.suggest(model, inputs, config=make_config(SETTINGS)).options


def exported(
    model: Any, inputs: dict[str, Tensor], frozen: dcr.DiTGraph, folder: Path
) -> None:
    """In both precisions, and back into torch and into a pipeline's place."""
    states = sampling_states([frozen.program], (900.0, 100.0), FlowEuler(2), 0)
    dcr.export([frozen], folder / "half", precision="fp16", states=states)
    dcr.export([frozen], folder / "wide")
    expected = flat(frozen(**inputs))[0].cpu()
    for options in ({}, {"backend": "torch", "model": model}):
        denoiser = dcr.DiffusersTransformer.from_artifact(folder / "wide", **options)
        sample = denoiser(**inputs).sample
        assert sample.device == inputs["hidden_states"].device
        torch.testing.assert_close(sample.cpu(), expected, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
