"""The documented cases of misuse: each gives its code, its exit status and no traceback."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_compile as dcr
from diffcr_compile import cli, errors
from diffcr_compile.error_cases import CASES
from diffcr_compile.workspace import Workspace
from tests import models

SOURCES = Path(dcr.__file__).parent
TINY = "python:tests.test_errors:tiny"


def tiny() -> Any:
    return models.tiny_dit()


def unroutable() -> Any:
    return models.convolution_throughout()


def no_tuple() -> str:
    return "a model"


class Broken(nn.Module):
    """The compiler asks every module for its parameters; what that raises is nobody's documented case."""

    def parameters(self, recurse: bool = True) -> Any:
        raise ZeroDivisionError("a bug somewhere")


def broken() -> Any:
    return Broken(), (torch.zeros(1, 1),)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("errors") / "out"
    model, inputs = models.tiny_dit()
    dcr.export(dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5), out)
    return out


@pytest.fixture
def work(tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an artifact and the files of a careless user; the tests run in it."""
    shutil.copytree(artifact, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "broken.yaml").write_text("calibration: [1,")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "number.yaml").write_text("3\n")
    (tmp_path / "target.yaml").write_text("nmae: board\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# (code, exit status, arguments, what happens before)
CLI: list[tuple[str, int, str, Callable[[Path], Any] | None]] = [
    ("DCR-U001", 2, "inspect my_model.py", None),
    ("DCR-U002", 2, "inspect python:no_such_module:make", None),
    ("DCR-U002", 2, "inspect python:tests.test_errors:no_such_factory", None),
    ("DCR-U003", 2, "inspect python:tests.test_errors:no_tuple", None),
    ("DCR-U004", 2, "inspect diffusers:nowhere", None),
    ("DCR-U005", 2, "inspect diffusers:model", None),
    ("DCR-U006", 2, "inspect diffusers:model --inputs nothing.safetensors", None),
    ("DCR-U009", 2, f"compile {TINY} -o new --set calibration.stesp=3", None),
    ("DCR-U010", 2, f"compile {TINY} -o new --set calibration.steps.more=3", None),
    ("DCR-U010", 2, f"compile {TINY} -o new --set calibration.steps=-1", None),
    ("DCR-U011", 2, f"compile {TINY} -o new --config nothing.yaml", None),
    ("DCR-U012", 2, f"compile {TINY} -o new --config broken.yaml", None),
    ("DCR-U012", 2, f"compile {TINY} -o new --config list.yaml", None),
    ("DCR-U013", 2, f"compile {TINY} -o new --set calibration.steps", None),
    ("DCR-U014", 2, f"compile {TINY} -o new --budget 160%", None),
    ("DCR-U014", 2, f"compile {TINY} -o new --budget most", None),
    ("DCR-U015", 2, f"compile {TINY} -o new --budget 0.1%", None),
    ("DCR-U016", 2, f"compile {TINY} -o other", None),
    ("DCR-U017", 2, f"compile {TINY} -o busy", lambda work: Workspace(work / "busy")),
    ("DCR-U018", 2, "report out", None),
    ("DCR-U019", 2, "show out -v -q", None),
    ("DCR-U027", 2, f"inspect {TINY} --target jetson-orin-nxx", None),
    ("DCR-U030", 2, "run out", None),
    ("DCR-U033", 2, "show out --log-json nowhere/log.json", None),
    ("DCR-U037", 2, "lint out --target target.yaml", None),
    ("DCR-M001", 3, "compile python:tests.test_errors:unroutable -o new", None),
    ("DCR-A001", 7, "show other", None),
    ("DCR-A002", 7, "show out", lambda work: (work / "out/manifest.json").write_text("{")),
    (
        "DCR-A003",
        7,
        "show out",
        lambda work: edit(work / "out/manifest.json", schema_version=99),
    ),
    ("DCR-A004", 7, "validate out", lambda work: flip(work / "out/onnx/bucket_00.onnx")),
    ("DCR-A004", 7, "validate out", lambda work: (work / "out/onnx/weights.bin").unlink()),
    ("DCR-A005", 7, "validate out", lambda work: (work / "out/onnx/more.onnx").write_text("")),
    ("DCR-X000", 1, "inspect python:tests.test_errors:broken", None),
]


def run(monkeypatch: pytest.MonkeyPatch, arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diffcr", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("code", "status", "arguments", "before"), CLI, ids=[f"{c}-{a}" for c, _, a, _ in CLI]
)
def test_misuse_on_the_command_line(
    code: str,
    status: int,
    arguments: str,
    before: Callable[[Path], Any] | None,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = before(work) if before else None  # a lock lives as long as its workspace
    assert run(monkeypatch, arguments) == status
    shown = capsys.readouterr()
    assert code in shown.err
    assert f"docs/errors.md#{code.lower()}" in shown.err
    assert "Traceback" not in shown.out + shown.err
    if isinstance(held, Workspace):
        held.close()


def test_an_unknown_setting_is_guessed(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, f"compile {TINY} -o new --set calibration.stesp=3")
    assert "did you mean 'steps'" in capsys.readouterr().err
    run(monkeypatch, f"compile {TINY} -o new --set routng.buckets=3")
    assert "did you mean 'routing'" in capsys.readouterr().err


def test_a_traceback_is_shown_when_asked_for(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect python:tests.test_errors:broken -v") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_is_an_event_of_the_log(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "validate other --log-json log.json")
    events = [json.loads(line) for line in Path("log.json").read_text().splitlines()]
    (found,) = [e for e in events if e["event"] == "error"]
    assert (found["code"], found["exit_code"]) == ("DCR-A001", 7)


def wrong_shape(work: Path) -> None:
    runner = dcr.load(work / "out")
    inputs = {name: tensor.numpy() for name, tensor in models.tiny_dit()[1].items()}
    runner(**{**inputs, "hidden_states": inputs["hidden_states"][:, :, :4]})


def missing_input(work: Path) -> None:
    dcr.load(work / "out")(hidden_states=torch.zeros(2, 1, 8, 8).numpy())


def freeze_twice_told(work: Path) -> None:
    dcr.freeze(dcr.route(*models.tiny_dit()), keep_ratio=0.5, schedule=None, result=None)
    dcr.freeze(dcr.route(*models.tiny_dit()))


def export_of_routed(work: Path) -> None:
    dcr.export([dcr.route(*models.tiny_dit())], work / "new")


def no_inputs(work: Path) -> None:
    dcr.route(models.tiny_dit()[0])


def hooked(work: Path) -> None:
    model, inputs = models.tiny_dit()
    model.register_forward_hook(lambda module, args, output: None)
    dcr.route(model, inputs)


PYTHON = [
    ("DCR-U020", missing_input), ("DCR-U021", wrong_shape), ("DCR-U024", freeze_twice_told),
    ("DCR-U025", export_of_routed), ("DCR-U026", no_inputs), ("DCR-M002", hooked),
]  # fmt: skip


@pytest.mark.parametrize(("code", "misuse"), PYTHON)
def test_misuse_in_python(code: str, misuse: Callable[[Path], None], work: Path) -> None:
    with pytest.raises(errors.DiffCRError) as caught:
        misuse(work)
    assert caught.value.code == code
    assert str(caught.value).startswith(f"{code}: ")
    assert caught.value.case.anchor in str(caught.value)


def test_at_least_25_cases_of_misuse_are_tried() -> None:
    assert len({code for code, *_ in [*CLI, *PYTHON]}) >= 25


def test_every_code_is_raised_and_every_raised_code_is_documented() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    general = {k.general_code for k in kinds if issubclass(k, errors.DiffCRError)}
    # export and passes are links, which rglob does not follow
    folders = (SOURCES, SOURCES / "export", SOURCES / "passes")
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    text = "".join(f.read_text() for f in files if f.name != "error_cases.py")
    used = set(re.findall(r'"(DCR-[A-Z]\d{3})"', text))
    assert used == set(CASES)
    assert general <= used
