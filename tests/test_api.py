"""The pipeline end to end on a tiny DiT, through the public names only."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffcr_compile as dcr
from diffcr_compile.calibrate.loop import CalibrationResult
from diffcr_compile.config import make_config
from diffcr_compile.errors import BudgetError, UnsupportedModelError, UsageError
from tests import models
from tests.conftest import equal, routed_tiny_dit

SETTINGS: dict[str, Any] = {
    "routing": {"buckets": 2, "multiple_of": 8},
    "rollouts": {"trajectories": 8, "steps": 4, "batch": 4},
    "calibration": {"steps": 12, "batch": 4, "save_every": 2},
}
REPORT_KEYS = {
    "budget": {"metric", "asked", "reached"},
    "speedup": {"macs_implied", "onnxruntime_cpu_loop"},
    "parity": {"routed_all_kept_bit_equal", "onnx_max_abs", "onnx_rel_l2"},
    "size": {"onnx_bytes", "dense_onnx_bytes"},
}
STAGES = {
    "capture",
    "route",
    "rollouts",
    "calibrate",
    "freeze",
    "export",
    "benchmark",
    "report",
}


def compiled(out: Path, **options: Any) -> Any:
    model, inputs = models.tiny_dit()
    settings = {
        "example_inputs": inputs,
        "budget": "60%",
        "config": make_config(SETTINGS),
        **options,
    }
    return dcr.compile(model, out, **settings)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(tmp_path_factory.mktemp("artifact") / "out")


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_report_has_its_stable_keys(artifact: Any) -> None:
    report = json.loads((artifact.folder / "report/report.json").read_text())
    for section, keys in REPORT_KEYS.items():
        assert keys <= set(report[section])
    assert set(report["seconds"]) >= STAGES
    assert set(report["peak_rss_bytes"]) >= STAGES
    assert all(value > 0 for value in report["peak_rss_bytes"].values())
    assert report["budget"]["asked"] == 0.6
    assert report["quality"] is None  # no evaluation was given, so nothing is claimed
    assert report["parity"]["routed_all_kept_bit_equal"] is True
    assert report["parity"]["onnx_max_abs"] <= 1e-4
    assert len(report["schedule"]) == 3
    # the sampler goes from noise, at the largest timestep, to picture
    assert report["noisiest_first"] == list(reversed(range(len(report["timestep_buckets"]))))
    assert all(
        len(kept) == len(report["timestep_buckets"]) for kept in report["schedule"].values()
    )
    assert "<html" in (artifact.folder / "report/report.html").read_text()


def test_reached_is_what_the_schedule_costs(artifact: Any) -> None:
    """Summed up by hand from the formula of the DiT block."""
    report = json.loads((artifact.folder / "report/report.json").read_text())
    width, tokens = 32, 64
    fixed = 6 * width**2 + 256 * width + width**2

    def block(kept: int) -> int:
        router = tokens * width if kept < tokens else 0
        return 12 * width**2 * kept + 2 * kept**2 * width + fixed + router

    blocks = list(report["schedule"].values())
    outer = report["macs"]["outer"]
    dense = outer + len(blocks) * block(tokens)
    buckets = len(report["timestep_buckets"])
    weights = [(high - low) / 1000 for low, high in report["timestep_buckets"]]
    cost = outer + sum(weights[i] * block(kept[i]) for kept in blocks for i in range(buckets))
    assert report["macs"]["dense"] == dense
    assert report["budget"]["reached"] == pytest.approx(cost / dense, rel=1e-9)
    assert report["budget"]["reached"] <= 0.6


def test_artifact_runs_like_the_frozen_graph(artifact: Any) -> None:
    from diffcr_compile.export.golden import read_golden

    runner = artifact.load()
    for bucket in runner.manifest.buckets:
        inputs, outputs = read_golden(artifact.folder / bucket["golden"])
        assert runner.bucket_of(float(inputs["timestep"][0])) == bucket["index"]
        np.testing.assert_allclose(runner(**inputs), outputs[0], rtol=0, atol=1e-4)


def test_second_call_runs_no_stage_again(artifact: Any) -> None:
    events: list[str] = []
    before = {
        n: h
        for n, h in hashes(artifact.folder).items()
        if n.startswith(("onnx", "model", "golden"))
    }
    compiled(artifact.folder, progress=lambda stage, *_: events.append(stage))
    after = {
        n: h
        for n, h in hashes(artifact.folder).items()
        if n.startswith(("onnx", "model", "golden"))
    }
    assert before == after
    assert not {"rollouts", "calibrate", "export"} & set(events)


def test_changed_budget_trains_again_but_keeps_the_rollouts(
    artifact: Any, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(artifact.folder, folder)
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("calibration/rollouts_*")}
    again = compiled(folder, budget="80%")
    assert {
        p.name: p.stat().st_mtime_ns for p in folder.glob("calibration/rollouts_*")
    } == times
    assert 0.75 < again.report["budget"]["reached"] <= 0.8


def test_killed_run_resumes_with_the_same_schedule(artifact: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of the calibration, as a power cut would do it."""
    out = tmp_path / "killed"
    code = (
        "from pathlib import Path; from tests.test_api import compiled; "
        f"compiled(Path({str(out)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    state = out / "calibration/state.safetensors"
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    events: list[tuple[str, int]] = []
    resumed = compiled(out, progress=lambda stage, done, *_: events.append((stage, done)))
    steps = [done for stage, done in events if stage == "calibrate"]
    assert steps[0] > 1  # it went on, it did not start again
    assert resumed.manifest.schedule == artifact.manifest.schedule
    assert (
        resumed.manifest.files["onnx/weights.bin"]
        == artifact.manifest.files["onnx/weights.bin"]
    )


def test_two_runs_in_one_folder_are_refused(artifact: Any) -> None:
    from diffcr_compile.workspace import Workspace

    with Workspace(artifact.folder), pytest.raises(UsageError, match="another diffcr run"):
        compiled(artifact.folder)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by diffcr"):
        compiled(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_budget_below_the_smallest_fails_before_any_training(tmp_path: Path) -> None:
    events: list[str] = []
    with pytest.raises(BudgetError, match="smallest reachable budget is"):
        compiled(
            tmp_path / "out", budget="5%", progress=lambda stage, *_: events.append(stage)
        )
    assert events == []


def test_model_without_routable_blocks_says_why_for_each() -> None:
    model, inputs = models.convolution_throughout()
    with pytest.raises(UnsupportedModelError) as caught:
        dcr.route(model, inputs)
    blocks = [
        n for n, m in model.named_modules() if n.startswith("blocks.") and n.count(".") == 1
    ]
    assert blocks
    assert all(f"{name}: " in str(caught.value) for name in blocks)


@pytest.mark.parametrize("budget", ["0%", "101%", "lots", 0, -1, 1.5])
def test_senseless_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(UsageError, match="budget"):
        dcr.calibrate(routed_tiny_dit(), budget=budget)


def test_inspect_changes_nothing_and_says_all() -> None:
    model, inputs = models.tiny_dit()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    plan = dcr.inspect(model, inputs)
    assert [line.split(":")[0] for line in plan.blocks] == [
        f"transformer_blocks.{i}" for i in range(3)
    ]
    assert plan.costs is not None
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    refused = dcr.inspect(*models.convolution_throughout())
    assert refused.blocks == ()
    assert refused.refused


def test_freeze_takes_one_of_three_and_a_uniform_ratio() -> None:
    model, inputs = models.tiny_dit()
    routed = routed_tiny_dit()
    with pytest.raises(UsageError, match="exactly one"):
        dcr.freeze(routed)
    with pytest.raises(UsageError, match=r"result is of type float.*keep_ratio=0\.5"):
        dcr.freeze(routed, 0.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="schedule is of type CalibrationResult"):
        dcr.freeze(routed, schedule=CalibrationResult(None, None, None, (), {}))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keep_ratio must be in"):
        dcr.freeze(routed, keep_ratio=1.2)
    (dense,) = dcr.freeze(routed, keep_ratio=1.0)
    assert equal(dense(**inputs), model(**inputs))
    (half,) = dcr.freeze(routed, keep_ratio=0.5)
    assert set(half.program.schedule.column(0).values()) == {32}
    with pytest.raises(UsageError, match="expected a ROUTED graph"):
        dcr.freeze(half, keep_ratio=0.5)


def test_buckets_with_equal_schedules_become_one() -> None:
    routed = routed_tiny_dit()
    blocks = [spec.name for spec in routed.program.blocks]
    schedule = dcr.TokenSchedule(
        dict.fromkeys(blocks, (32, 32, 16, 32)),
        dict.fromkeys(blocks, 64),
        dcr.TimestepBuckets.even(4),
    )
    frozen = dcr.freeze(routed, schedule=schedule)
    assert len(frozen) == 3
    assert frozen[0].program.schedule.buckets.edges == (0.0, 500.0, 750.0, 1000.0)


def test_public_names_survive_the_import_of_packages_of_the_same_name() -> None:
    code = (
        "import diffcr_compile.export.artifact, diffcr_compile.calibrate.loop, diffcr_compile as dcr\n"
        "assert callable(dcr.export) and callable(dcr.calibrate)\n"
        "from diffcr_compile.errors import UsageError\n"
        "for call in (lambda: dcr.export([1], 'x'), lambda: dcr.calibrate(1, budget=1)):\n"
        "    try: call()\n"
        "    except UsageError as error: assert 'expected a' in str(error)\n"
        "    else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_graphs_may_have_another_batch_than_the_example(tmp_path: Path) -> None:
    model, inputs = models.tiny_dit()
    config = make_config({**SETTINGS, "export": {"batch": 3}})
    out = dcr.compile(
        model, tmp_path / "o", example_inputs=inputs, budget="60%", config=config
    )
    assert {spec["shape"][0] for spec in out.manifest.inputs} == {3}


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"t": None}, "DCR-U000", "missing a required argument: 't'"),
        ({"surprise": torch.ones(1)}, "DCR-U000", "unexpected keyword argument 'surprise'"),
        ({"x": torch.ones(2, 3, 6, 6)}, "DCR-U082", "does not run on the example inputs"),
    ],
    ids=["missing", "unknown", "channels"],
)
def test_example_inputs_that_do_not_fit_are_told_in_words(
    change: dict[str, Any], code: str, said: str
) -> None:
    model, inputs = models.plain()
    given = {n: v for n, v in {**inputs, **change}.items() if v is not None}
    with pytest.raises(UsageError, match=said) as caught:
        dcr.route(model, given)
    assert caught.value.code == code
