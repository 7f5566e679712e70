"""The hard tests in their short form; ``make soak`` runs them in full.

Each runs in a process of its own where it forks, or where it measures the memory of the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import cases, corruption, determinism, load, modules

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return cases.tiny_artifact(tmp_path_factory.mktemp("reliability") / "artifact")


def apart(module: str, out: Path, *arguments: str) -> Any:
    """What a module of ``benchmarks.reliability`` finds, run in a process of its own."""
    command = [
        sys.executable,
        "-m",
        f"benchmarks.reliability.{module}",
        "--out",
        str(out),
        *arguments,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def check_interrupted(found: dict[str, Any], kills: int, faults: int) -> None:
    assert found["kills"]["wrong"] == []
    assert found["kills"]["kills"] >= kills
    assert found["kills"]["not_loadable"] >= 1
    assert found["faults"]["wrong"] == []
    assert sum(found["faults"]["faults"].values()) >= faults
    assert set(found["faults"]["faults"]) == {"answer", "read", "full"}
    assert found["faults"]["outcomes"]["exit 5"] >= faults // 2


def test_killed_or_refused_by_the_disk_a_compilation_resumes_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    found = apart(
        "forked",
        tmp_path / "found.json",
        "--verbs",
        "compile",
        "--kills",
        "6",
        "--faults",
        "6",
    )
    check_interrupted(found, 6, 5)


def test_every_corrupted_artifact_is_refused_with_a_documented_code(
    artifact: tuple[Path, dict[str, Any]],
) -> None:
    result = corruption.run(*artifact, count=800)
    assert result["wrong"] == []
    assert result["corruptions"] >= 800
    assert set(result["codes"]) == {f"DCR-A00{number}" for number in range(1, 8)}
    assert result["memory_peak_over_normal"] <= 2


def test_many_threads_get_the_outputs_of_one(artifact: tuple[Path, dict[str, Any]]) -> None:
    result = load.run(*artifact, calls=1000, threads=8)
    assert result["wrong_outputs"] == 0
    assert result["buckets"] == 2
    assert result["memory_growth"] < 0.05  # of 1,000 calls; 1 % of 10,000 is for `make soak`


def test_random_models_are_routed_or_refused_as_they_must_be() -> None:
    result = modules.run(count=8, first=20_000)
    assert result["wrong"] == []
    assert result["verdicts"]["routed"] >= 1
    assert min(result["blocks"].values()) >= 1


def test_another_process_gives_the_same_bytes() -> None:
    settings = [*determinism.SMALL, "export.profiles=false"]
    result = determinism.run(determinism.HAND, settings, determinism.PROCESSES[:2])
    assert result["different"] == []
    assert result["files"] >= 8


def test_a_difference_between_two_results_is_found() -> None:
    one = {"files": {"a": "1", "b": "2"}, "reached": 0.5}
    assert determinism._differences(one, one) == []
    two = {"files": {"a": "1", "b": "3"}, "reached": 0.5}
    assert determinism._differences(one, two) == ["b", "files"]


def test_memory_stays_where_it_is_during_a_calibration(tmp_path: Path) -> None:
    result = apart("long_run", tmp_path / "found.json", "--steps", "100")
    assert result["checkpoints"] == 20
    assert result["memory_growth"] < 0.02


@pytest.mark.soak
def test_at_least_200_kills_and_200_disk_faults(tmp_path: Path) -> None:
    check_interrupted(apart("forked", tmp_path / "found.json"), 290, 290)


@pytest.mark.soak
def test_at_least_500_random_models() -> None:
    assert modules.run(count=500)["wrong"] == []


@pytest.mark.soak
def test_at_least_2000_corruptions(artifact: tuple[Path, dict[str, Any]]) -> None:
    result = corruption.run(*artifact, count=2500)
    assert result["wrong"] == []
    assert result["corruptions"] >= 2000


@pytest.mark.soak
def test_ten_thousand_calls(artifact: tuple[Path, dict[str, Any]]) -> None:
    result = load.run(*artifact, calls=10_000, threads=8)
    assert result["wrong_outputs"] == 0
    assert result["memory_growth"] < 0.01


@pytest.mark.soak
def test_other_processes_and_numbers_of_threads_give_the_same_bytes(tmp_path: Path) -> None:
    result = apart("determinism", tmp_path / "found.json")
    assert [each["different"] for each in result["processes"]] == [[], []]
    small, reference = result["threads"]
    assert small["different"] == []
    # golden outputs are sums, the rest is not: see docs/reliability.md
    assert {line.split(": ")[1].partition("/")[0] for line in reference["different"]} <= {
        "golden",
        "files",
        "manifest",
    }


@pytest.mark.soak
def test_memory_of_a_long_calibration_is_bounded(tmp_path: Path) -> None:
    result = apart("long_run", tmp_path / "found.json", "--steps", "5000")
    assert result["memory_growth"] < 0.02
