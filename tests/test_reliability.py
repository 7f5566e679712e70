"""The hard tests in their short form; ``make soak`` runs them in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import cases, corruption, kills, load, modules


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return cases.tiny_artifact(tmp_path_factory.mktemp("reliability") / "artifact")


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


def test_a_killed_compilation_resumes_to_the_same_bytes() -> None:
    result = kills.run(points=2, seed=1, report=lambda line: None)
    assert result["wrong"] == []
    assert result["kills"] == 2


def test_random_models_are_routed_or_refused_as_they_must_be() -> None:
    result = modules.run(count=8, first=20_000)
    assert result["wrong"] == []
    assert result["verdicts"]["routed"] >= 1
    assert min(result["blocks"].values()) >= 1


@pytest.mark.soak
def test_at_least_500_random_models() -> None:
    assert modules.run(count=500)["wrong"] == []


@pytest.mark.soak
def test_at_least_200_kills() -> None:
    result = kills.run(points=250)
    assert result["wrong"] == []
    assert result["kills"] >= 200


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
