"""The user's measure of quality: taken of the artifact that is there, and nothing broken is kept of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

import diffcr_compile as dcr
from diffcr_compile.errors import ArtifactError, UsageError
from tests import models

SETTINGS = {
    "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
    "rollouts": {"trajectories": 2, "steps": 2, "batch": 2},
    "calibration": {"steps": 0, "batch": 2},
}
GOOD = {"metric": "distance", "dense": 1.0, "compressed": 2.0, "num_samples": 3}


def good(*_: Any) -> dict[str, Any]:
    return GOOD


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a compilation that was evaluated by :func:`good`."""
    folder = tmp_path_factory.mktemp("made") / "out"
    compiled(folder, good)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be worked on."""
    return shutil.copytree(made, tmp_path / "out")


def compiled(out: Path, evaluate: Any, **export: Any) -> dict[str, Any]:
    """The report's quality."""
    model, inputs = models.plain()
    artifact = dcr.compile(
        model,
        out,
        example_inputs=inputs,
        budget="80%",
        config={**SETTINGS, "export": export},
        evaluate=evaluate,
    )
    assert artifact.report is not None
    quality: dict[str, Any] = artifact.report["quality"]
    return quality


def test_every_artifact_is_evaluated_once(out: Path) -> None:
    calls: list[Path] = []

    def evaluate(dense: Any, compressed: Any, folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {**GOOD, "compressed": float(len(calls))}

    assert compiled(out, evaluate)["compressed"] == 1
    assert compiled(out, evaluate)["compressed"] == 1
    # another artifact from the same calibration
    assert compiled(out, evaluate, precision="fp16")["compressed"] == 2


def test_a_measure_with_fields_is_taken_again_when_they_change(out: Path) -> None:
    @dataclasses.dataclass
    class Counted:
        num_samples: int

        def __call__(self, dense: Any, compressed: Any, folder: Path) -> dict[str, Any]:
            return {**GOOD, "num_samples": self.num_samples}

    assert compiled(out, Counted(5))["num_samples"] == 5
    assert compiled(out, Counted(7))["num_samples"] == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({n: v for n, v in GOOD.items() if n != "compressed"}, "no 'compressed', only"),
        ({**GOOD, "dense": "1.0"}, "'dense' = '1.0', a str"),
        ({**GOOD, "compressed": float("nan")}, "JSON cannot hold"),
        (None, "a NoneType"),
    ],
    ids=["missing", "text", "nan", "none"],
)
def test_a_wrong_answer_is_told_in_words_and_not_kept(
    out: Path, wrong: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        compiled(out, lambda *_: wrong)
    assert caught.value.code == "DCR-U081"
    dcr.load(out)  # the artifact is there
    assert compiled(out, good) == GOOD


@pytest.mark.parametrize(
    "name", ["report/quality.json", "model/calibration.json", "model/routed.safetensors"]
)
def test_a_file_that_was_cut_says_what_to_delete(out: Path, name: str) -> None:
    path = out / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="changed from outside"):
        compiled(out, good)
    if name.startswith("model"):
        for part in ("calibration.json", "routed.safetensors"):
            (out / "model" / part).unlink()
    else:
        path.unlink()
    assert compiled(out, good) == GOOD
