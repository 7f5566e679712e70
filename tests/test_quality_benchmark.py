"""The baselines of ``benchmarks/quality`` against plain references: a weak baseline would flatter us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from benchmarks.quality import merging, paper
from benchmarks.quality.jobs import jobs
from benchmarks.quality.narrow_products import emulated_products
from benchmarks.quality.reuse import StepReuse
from benchmarks.quality.settings import SMOKE, Scale
from benchmarks.quality.table import BY_GRADIENTS, ahead_of, knee, standing_for, summarise
from benchmarks.reference import inpainting
from diffcr_compile.reference import demo
from diffcr_compile.routing import TokenRouter, TokenSelector

TOKENS = merging.GRID**2


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------- bfloat16 products


@pytest.fixture
def emulated() -> Iterator[None]:
    library = emulated_products()
    yield
    library._destroy()


@pytest.mark.usefixtures("emulated")
def test_emulated_products_are_those_of_bfloat16_operands() -> None:
    """Output and both gradients against double precision on operands that were rounded before."""
    x, w = (
        torch.randn(s, generator=generator(), requires_grad=True) for s in ((9, 64), (32, 64))
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = nn.functional.linear(x, w)
    above = torch.randn(found.shape, generator=generator()).bfloat16()
    found.backward(above)
    a, b, g = (t.detach().bfloat16().double() for t in (x, w, above))
    assert found.dtype == torch.bfloat16
    for mine, exact in ((found, a @ b.T), (x.grad, g @ b), (w.grad, g.T @ a)):
        assert mine is not None
        # half a unit in the last of 8 bits, and a little for sums in float32
        assert ((mine.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["matmul", "addmm", "bmm", "conv2d", "attention"])
def test_every_emulated_product_is_the_one_it_stands_for(name: str) -> None:
    call, shapes = {
        "matmul": (torch.matmul, ((2, 8, 16), (16, 4))),
        "addmm": (torch.addmm, ((8, 4), (8, 16), (16, 4))),
        "bmm": (torch.bmm, ((2, 8, 16), (2, 16, 4))),
        "conv2d": (partial(torch.conv2d, stride=2), ((2, 3, 8, 8), (4, 3, 2, 2))),
        "attention": (nn.functional.scaled_dot_product_attention, ((2, 2, 8, 4),) * 3),
    }[name]
    given = [torch.randn(shape, generator=generator()) for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        found = call(*given)
    exact = call(*(t.bfloat16().double() for t in given))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-5)


# ------------------------------------------------------------------------------ merged tokens


@pytest.mark.parametrize(("left", "side"), [(200, 2), (64, 2), (40, 4), (16, 4)])
def test_every_window_has_one_destination(left: int, side: int) -> None:
    picks = merging.window_picks(TOKENS, left, generator())
    across = merging.GRID // side
    windows = {(int(p) // merging.GRID // side, int(p) % merging.GRID // side) for p in picks}
    assert len(picks) == across**2 <= left
    assert windows == {(row, column) for row in range(across) for column in range(across)}


def test_merging_is_the_slow_loop() -> None:
    """Most similar sources go, each into its nearest destination; averages, then copies back."""
    hidden, left = torch.randn(2, TOKENS, 5), 150
    destinations = merging.window_picks(TOKENS, left, generator()).tolist()
    source, target = merging.matches(hidden, left, generator())
    few = merging.merge(hidden, source, target)
    back = merging.unmerge(few, source, target, TOKENS)
    for sample in range(2):
        x = hidden[sample]
        best = {}
        for token in sorted(set(range(TOKENS)) - set(destinations)):
            similar = [
                float(torch.cosine_similarity(x[token], x[d], dim=0)) for d in destinations
            ]
            best[token] = max(zip(similar, destinations, strict=True))
        gone = sorted(best, key=lambda token: -best[token][0])[: TOKENS - left]
        assert dict(zip(source[sample].tolist(), target[sample].tolist(), strict=True)) == {
            token: best[token][1] for token in gone
        }
        stays = [token for token in range(TOKENS) if token not in gone]
        for row, token in enumerate(stays):
            group = [token, *(g for g in gone if best[g][1] == token)]
            torch.testing.assert_close(few[sample, row], x[group].mean(0))
            for member in group:
                torch.testing.assert_close(back[sample, member], few[sample, row])


def test_merging_nothing_is_the_block_itself() -> None:
    block = nn.Linear(5, 5)
    hidden = torch.randn(2, TOKENS, 5)
    same = merging.merged(block.forward, TOKENS, generator())(hidden)
    torch.testing.assert_close(same, block(hidden))


@pytest.mark.parametrize("budget", [0.8, 0.42])
def test_as_many_tokens_are_left_as_the_budget_pays_for(budget: float) -> None:
    program = dcr.route(demo.load_reference_dit(), demo.example_inputs()).program
    left, share = merging.kept_for(program, budget)
    assert share <= budget < share + 2 / TOKENS
    assert 0 < left < TOKENS


# --------------------------------------------------------------------------------- step reuse


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + torch.tanh(self.scale * x + timestep[:, None] / 1000)


class ResidualStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Residual(0.3 * i + 0.1) for i in range(5))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        for block in self.transformer_blocks:
            x = block(x, timestep)
        return type("Output", (), {"sample": x})


def test_a_cached_step_adds_what_the_middle_blocks_added_before() -> None:
    reuse = StepReuse(ResidualStack(), budget=0.6, block_share=0.2)
    reuse.interval, reuse.cached, reuse.step = 2, 3, 0
    blocks = ResidualStack().transformer_blocks
    x, labels = torch.randn(2, 4), torch.zeros(2)
    added: Tensor | None = None
    for step, timestep in enumerate((1000.0, 750.0, 500.0, 250.0)):
        found = reuse(x, timestep, labels)
        times = torch.full((2,), timestep)
        expected = blocks[0](x, times)
        if step % 2 == 0:
            entered = expected
            for block in blocks[1:4]:
                expected = block(expected, times)
            added = expected - entered
        else:
            assert added is not None
            expected = expected + added
        expected = blocks[4](expected, times)
        torch.testing.assert_close(found, expected)
        x = x - found / 4


@pytest.mark.parametrize("budget", [0.8, 0.6, 0.42])
@pytest.mark.parametrize("steps", [4, 12])
def test_every_choice_of_the_cache_stays_within_the_budget(budget: float, steps: int) -> None:
    reuse = StepReuse(ResidualStack(), budget, block_share=0.197)
    choices = []
    for interval in range(2, steps + 1):
        cached = reuse._needed(interval, steps)
        if cached >= len(reuse.blocks):
            continue
        full = len(range(0, steps, interval))
        macs = (full + (steps - full) * (1 - cached * 0.197)) / steps
        assert macs <= budget < macs + 0.197
        choices.append((interval, cached))
    assert choices


# --------------------------------------------------------------------------- the paper's recipe


def test_the_papers_bins_bracket_the_ratio_and_blend_to_it() -> None:
    selector = TokenSelector(TokenRouter(4), 100, 0, shares_index=False, gate="paper")
    for ratio in (0.1, 0.12, 0.55, 0.6, 0.95, 1.0):
        paper.Recipe._between_bins(selector, torch.tensor(ratio))
        assert selector.low_tokens is not None
        assert selector.blend is not None
        weight = float(selector.blend)
        assert 0 <= weight <= 1.00001
        blended = weight * selector.kept_tokens + (1 - weight) * selector.low_tokens
        assert blended == pytest.approx(100 * ratio, abs=1e-3)
        assert selector.kept_tokens - selector.low_tokens == 10


# ------------------------------------------------------------------------------------ inpainting


@pytest.mark.parametrize("size", [32, 16])
def test_a_hole_is_one_rectangle_inside_the_picture(size: int) -> None:
    scale = 32 // size
    masks = inpainting.holes(200, generator(), size)
    assert masks.shape == (200, 1, size, size)
    for mask in masks[:, 0]:
        rows, columns = mask.amax(1).nonzero().flatten(), mask.amax(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].min() == 1
        assert mask.sum() == len(rows) * len(columns)
        for side in (rows, columns):
            assert scale * len(side) + scale - 1 >= inpainting.SMALLEST
            assert scale * (len(side) - 1) < inpainting.LARGEST
            assert scale * side[0] >= inpainting.BORDER
            assert scale * side[-1] < 32 - inpainting.BORDER


def test_known_pixels_come_back_and_painted_ones_stay() -> None:
    images, painted = torch.rand(3, 1, 32, 32), torch.rand(3, 1, 32, 32)
    masks = inpainting.holes(3, generator())
    known = inpainting.condition(images, masks)
    assert known[:, 1:][masks == 1].abs().max() == 0
    found = inpainting.pasted(painted, known)
    assert torch.equal(found[masks == 0], images[masks == 0])
    assert torch.equal(found[masks == 1], painted[masks == 1])


def test_the_inpainting_model_uses_the_known_pixels() -> None:
    """Its first guess from pure noise is nearer to a stripe pattern that it is shown than to its negative."""
    model = inpainting.load_inpainting_dit()
    stripes = torch.ones(1, 1, 32, 32)
    stripes[..., ::8, :] = -1
    noise = torch.randn(1, 1, 32, 32, generator=generator())
    masks = inpainting.holes(1, generator())
    errors = []
    for picture in (stripes, -stripes):
        given = torch.cat([noise, inpainting.condition(picture, masks)], 1)
        with torch.no_grad():
            velocity = model(
                given, timestep=torch.tensor([1000.0]), class_labels=torch.tensor([3])
            ).sample
        shown = (noise - velocity)[masks == 0]
        errors.append((shown - picture[masks == 0]).square().mean())
    assert max(errors) < 0.2  # of 4 between the two pictures


# ------------------------------------------------------------------------------------- the table


def test_no_job_comes_twice_and_the_dense_model_comes_before_what_is_compared_with_it() -> (
    None
):
    for scale in (Scale(), SMOKE):
        order = [job for group in jobs(scale) for job in group]
        assert len({job.name for job in order}) == len(order)
        for number, job in enumerate(order):
            assert job.dense in order[: number + 1]


def run(
    variant: str,
    kid: float,
    seed: int,
    budget: float = 0.6,
    steps: int = 4,
    training: float = 1.0,
) -> dict:
    figures = {"kid_x1000": kid, "frechet": 1.0, "class_accuracy": 0.5, "macs": budget}
    key = {"task": "generation", "variant": variant, "budget": budget}
    key |= {"seed": seed, "steps": steps, "training": training}
    return {**key, **figures, "psnr_to_dense_db": None, "steps_taken": steps}


def test_better_means_by_more_than_both_spreads() -> None:
    kids = {"ours": (10, 12), "worse": (13, 20), "equal": (11, 20), "best": (5, 9)}
    runs = [
        run(name, kid, seed) for name, both in kids.items() for seed, kid in enumerate(both)
    ]
    found = {entry["variant"]: entry for entry in ahead_of(runs, 0.6, 4)}
    assert {name: entry["better"] for name, entry in found.items()} == {
        "worse": True,
        "equal": None,
        "best": False,
    }
    assert found["worse"]["difference"] == pytest.approx(11 - 16.5)


def test_seeds_are_compared_with_the_same_noise() -> None:
    """What a draw of noise does to both is larger than what is between them."""
    kids = {"ours": (10, 20, 30), "worse": (11, 22, 31), "better": (9, 18, 29), "one": (50,)}
    kids["equal"] = (11, 19, 30)
    runs = [
        run(name, kid, seed) for name, every in kids.items() for seed, kid in enumerate(every)
    ]
    found = {entry["variant"]: entry for entry in ahead_of(runs, 0.6, 4)}
    assert found["worse"]["by_seed"] == [-1, -2, -1]
    assert {name: entry["better"] for name, entry in found.items() if name != "one"} == {
        "worse": None, "better": None, "equal": None,
    }  # fmt: skip
    assert {name: entry["better_in_every_seed"] for name, entry in found.items()} == {
        "worse": True, "better": False, "equal": None, "one": None,
    }  # fmt: skip


def test_what_was_trained_for_a_shorter_time_is_compared_with_its_like() -> None:
    """And with what is not trained at all."""
    runs = [run("ours", 10, 0), run("uniform (Mixture-of-Depths)", 11, 0)]
    runs += [run("ours", 20, 0, training=0.25), run("blocks dropped", 22, 0, training=0.25)]
    runs += [run("dense", 5, 0, 1.0), run("dense, fewer steps", 30, 0)]
    for training, others in (
        (1.0, {"uniform (Mixture-of-Depths)": -1, "dense": 5, "dense, fewer steps": -20}),
        (0.25, {"blocks dropped": -2, "dense": 15, "dense, fewer steps": -10}),
    ):
        found = ahead_of(runs, 0.6, 4, training=training)
        assert {row["variant"]: row["difference"] for row in found} == others
    assert len(summarise(runs)) == len(runs)
    assert standing_for(BY_GRADIENTS, runs, 0.6, 4, 0.25) == "ours"
    assert standing_for(BY_GRADIENTS, runs, 0.6, 4, 0.5) == ""


def test_a_quarter_of_the_samples_is_half_the_steps_of_half_the_size() -> None:
    full = Scale()
    short = full.trained_for(0.25)
    assert (short.calibration_steps, short.batch) == (320, 32)
    assert full.trained_for(1.0) == full
    names = {job.name for group in jobs(full) for job in group}
    assert {
        "ours-steps-distilled_60_8steps_0",
        "ours-steps-distilled_60_8steps_0_trained25",
    } <= names


def test_runs_of_other_settings_are_not_taken_up(tmp_path: Path) -> None:
    from benchmarks.quality.__main__ import RESULTS, conditions, made_alike

    now = conditions(Scale())
    published = json.loads(RESULTS.read_text())["conditions"]
    assert made_alike(published, now), "the committed runs would all be made anew"
    on_gpu = conditions(Scale(device="cuda"))
    assert made_alike(json.loads(json.dumps(on_gpu)), now)
    for section, name, value in (
        ("calibration", "lr_router", 0.5),
        ("routing", "buckets", 2),
        ("calibration", "no_such_setting", 1),
    ):
        other = json.loads(json.dumps(now))
        other["settings_of_ours"][section][name] = value
        assert not made_alike(other, now)
    lacking = json.loads(json.dumps(now))
    del lacking["settings_of_ours"]["calibration"]["rank_timeout"]  # stands at its default
    assert made_alike(lacking, now)
    del lacking["settings_of_ours"]["calibration"]["lr_weights"]  # does not
    assert not made_alike(lacking, now)
    assert not made_alike({**now, "samples": 7}, now)


def test_the_knee_is_where_fewer_dense_steps_are_as_good() -> None:
    dense = [run("dense", kid, 0, 1.0, steps) for steps, kid in ((2, 90), (4, 40), (8, 10))]
    ours = [run("ours", 50, 0, 0.6, 4), run("ours", 15, 0, 0.6, 8)]
    found = knee(summarise(dense + ours), 0.6)
    assert found["dense_by_steps"] == {2: 90, 4: 40, 8: 10}
    told = ("steps", "dense_steps_paid_for", "dense_steps_worse", "dense_steps_as_good")
    assert [tuple(row[name] for name in told) for row in found["ours"]] == [
        (4, 2.4, 2, 4),
        (8, 4.8, 4, 8),
    ]


def test_ours_is_the_one_with_distilled_steps_where_it_was_run() -> None:
    both = [run("ours", 50, 0, 0.6, 8), run("ours, steps distilled", 40, 0, 0.6, 8)]
    assert standing_for(BY_GRADIENTS, both, 0.6, 8) == "ours, steps distilled"
    assert standing_for(BY_GRADIENTS, both[:1], 0.6, 8) == "ours"
    assert standing_for(BY_GRADIENTS, both, 0.42, 8) == ""


POOL_OF_ONE = """
import concurrent.futures, multiprocessing, os, time
from benchmarks.quality import pool
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, pool._begin) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        workers.submit(time.sleep, 600).result()
"""


def test_runs_end_with_the_comparison_that_began_them(tmp_path: Path) -> None:
    script = tmp_path / "pool_of_one.py"
    script.write_text(POOL_OF_ONE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert runs(worker)
        parent.kill()
    deadline = time.monotonic() + 30
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(worker)


def runs(pid: int) -> bool:
    """Whether there is such a process, other than one that ended and waits to be asked how."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.soak
def test_the_whole_comparison_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.quality import __main__ as quality

    monkeypatch.setattr("sys.argv", ["quality", "--smoke", "--work", str(tmp_path)])
    quality.main()
    report = json.loads((tmp_path / "smoke/quality.json").read_text())
    assert report["missing"] == []
    for row in report["summary"]:
        if row["budget"] < 1:
            assert row["macs"]["max"] <= row["budget"] + 1e-9
