"""What ``benchmarks/held_out_error`` counts."""

from __future__ import annotations

import pytest
import torch

import diffcr_compile as dcr
from benchmarks.held_out_error import OURS, error, summary
from diffcr_compile.calibrate.data import TeacherStates
from diffcr_compile.program import run_flat
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from tests import models


def test_the_error_is_summed_over_the_graph_of_each_states_bucket() -> None:
    model, inputs = models.tiny_dit()
    routed = dcr.route(model, inputs)
    names = [spec.name for spec in routed.program.blocks]
    every = {spec.name: spec.num_tokens for spec in routed.program.blocks}
    kept = {
        name: (every[name] // 2, every[name]) for name in names
    }  # the noisier bucket keeps all
    frozen = dcr.freeze(routed, schedule=TokenSchedule(kept, every, TimestepBuckets.even(2)))
    batch = 4
    states = {
        "hidden_states": torch.randn(batch, *inputs["hidden_states"].shape[1:]),
        "timestep": torch.tensor([100.0, 900.0, 800.0, 300.0]),
        "class_labels": torch.arange(batch),
    }
    with torch.no_grad():
        target = run_flat(routed.program, states)[0]
        low = run_flat(frozen[0].program, states)[0]
    found = error(frozen, TeacherStates(states, target, states["timestep"]))
    off = (low - target)[[0, 3]].square().sum()  # the two states of the compressed bucket
    assert off > 0
    # sums of float32 in another order
    assert found == pytest.approx(float(off / target.square().sum()), rel=1e-3)


def test_variants_are_compared_seed_by_seed() -> None:
    def runs(ours: tuple[float, ...], other: tuple[float, ...]) -> list[dict]:
        both = {OURS: ours, "other": other}
        return [
            {"variant": name, "seed": seed, "error": error}
            for name, errors in both.items()
            for seed, error in enumerate(errors)
        ]

    once_better = summary(runs((1.0, 3.0), (2.0, 2.5)))["other"]
    assert not once_better["worse_with_every_seed"]
    assert once_better["over_ours"] == pytest.approx((2 + 2.5 / 3) / 2)
    always = summary(runs((1.0, 3.0), (1.5, 3.5)))["other"]
    assert always["worse_with_every_seed"]  # though the ranges overlap
    assert (always["min"], always["max"], always["mean"]) == (1.5, 3.5, 2.5)
