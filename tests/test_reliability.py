"""The hard tests in their short form; ``make soak`` runs them in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import cases, corruption


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
