"""Commands, their output and their exit codes, in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffcr_compile import cli
from diffcr_compile.data_files import parse_yaml
from tests import models

SMALL = [
    "--set", "routing.buckets=2", "--set", "routing.multiple_of=8", "--set", "rollouts.trajectories=4",
    "--set", "rollouts.steps=4", "--set", "calibration.steps=4", "--set", "calibration.batch=4",
]  # fmt: skip


def tiny() -> Any:
    return models.tiny_dit()


def unroutable() -> Any:
    return models.convolution_throughout()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of ``diffcr arguments``."""
    monkeypatch.setattr(sys, "argv", ["diffcr", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "out"
    patch = pytest.MonkeyPatch()
    code = run(
        patch,
        "compile",
        "python:tests.test_cli:tiny",
        "-o",
        str(folder),
        "--budget",
        "70%",
        *SMALL,
    )
    patch.undo()
    assert code == 0
    return folder


def test_compile_writes_the_artifact(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert names >= {"manifest.json", "model", "calibration", "onnx", "golden", "report"}
    assert {p.name for p in (out / "onnx").iterdir()} >= {"bucket_00.onnx", "weights.bin"}


def test_validate_show_bench_and_report(out: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "validate", str(out), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    # each bucket's own graph, then the graph that serves several, at each of its buckets
    assert sorted({row["bucket"] for row in rows}) == [0, 1]
    assert {row["step"].split(",")[0] for row in rows} == {"golden -> ONNX Runtime"}
    assert all(row["max_abs"] <= 1e-4 and row["non_finite"] == 0 for row in rows)
    assert run(monkeypatch, "show", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["schedule"].keys() == {
        f"transformer_blocks.{i}" for i in range(3)
    }
    assert run(monkeypatch, "bench", str(out), "--steps", "4", "--repeats", "2", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["conditions"]["pair_ratios"]) == 2
    (out / "report/report.html").unlink()
    assert run(monkeypatch, "report", str(out)) == 0
    assert (out / "report/report.html").exists()


def test_inspect_says_what_is_routed_and_refused(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "inspect", "python:tests.test_cli:tiny", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["blocks"]) == 3
    assert plan["macs_dense"] > plan["macs_outer"] > 0
    assert run(monkeypatch, "inspect", "python:tests.test_cli:unroutable") == 0
    assert "refused" in capsys.readouterr().out


BAD_FACTORIES = {
    "def make(): raise RuntimeError('boom [red]markup[/]')": ("DCR-U003", "boom [red]markup[/]"),
    "def make(path): pass": ("DCR-U003", "missing 1 required positional argument"),
    "make = 3": ("DCR-U003", "got int"),
    "def make(): return 1, 2": ("DCR-U003", "got int as model"),
    "import torch\ndef make(): return torch.nn.Linear(1, 1), {}": ("DCR-U003", "without any tensor"),
    "import torch\ndef make(): return torch.nn.Linear(1, 1), torch.zeros(1, 1), 'x'": ("DCR-U003", "as conditions"),
    "import sys\ndef make(): sys.exit(3)": ("DCR-U003", "SystemExit: 3"),
    "import sys\nsys.exit(5)": ("DCR-U002", "SystemExit: 5"),
    "make = (": ("DCR-U002", "SyntaxError"),
    "import nosuchmodule": ("DCR-U002", "nosuchmodule"),
    "1 / 0": ("DCR-U002", "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("source", BAD_FACTORIES)
def test_what_a_users_factory_does_wrong_is_told_as_theirs(
    source: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    code, words = BAD_FACTORIES[source]
    name = f"factory_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "inspect", f"python:{name}:make") == 2
    err = capsys.readouterr().err
    assert code in err
    assert words in err


@pytest.mark.parametrize("model", ["python::make", "python:a:", "python:a", "nosuch"])
def test_a_model_without_a_name_is_not_understood(
    model: str, monkeypatch: Any, capsys: Any
) -> None:
    assert run(monkeypatch, "inspect", model) == 2
    assert "DCR-U001" in capsys.readouterr().err


def chatty() -> Any:
    print("hello from the factory")
    return models.tiny_dit()


def test_what_a_factory_prints_stays_out_of_the_result(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "inspect", "python:tests.test_cli:chatty", "--json") == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "hello from the factory" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "python:tests.test_cli:tiny", "--inputs", "nosuch.safetensors"),
        ("inspect", "demo", "--inputs", "nosuch.safetensors"),
        ("compile", "demo", "--pipeline-inputs", "nosuch.yaml", "--dry-run"),
        ("init", "python:tests.test_cli:tiny", "--pipeline-inputs", "nosuch.yaml"),
    ],
)
def test_files_of_inputs_are_refused_where_the_model_has_its_own(
    arguments: tuple[str, ...], monkeypatch: Any, capsys: Any
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "is for diffusers:<folder>" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "calibration: {steps: 2}\ncalibration: {batch: 2}",
        "calibration: {steps: 2, steps: 3}",
        "calibration:\n  steps: 2\n  steps: 2",
    ],
)
def test_a_key_that_is_given_twice_is_refused(
    text: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    arguments = ("compile", "python:tests.test_cli:tiny", "-c", str(path), "--dry-run")
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert "DCR-U012" in err
    assert "is given twice, in line" in err


def test_an_anchor_may_be_merged_and_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3"
    assert parse_yaml(text)["b"] == {"x": 3, "y": 2}


def test_a_folder_is_no_configuration(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    arguments = ("compile", "python:tests.test_cli:tiny", "-c", str(tmp_path), "--dry-run")
    assert run(monkeypatch, *arguments) == 2
    assert "is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--bucket", "0"),
        ("--write-polygraphy", "x", "--bisect"),
        ("--write-polygraphy", "x", "--bucket", "1"),
        ("--results", "x", "--level", "engine"),
        ("--results", "x", "--write-polygraphy", "x"),
    ],
)
def test_options_of_validate_that_would_do_nothing_are_refused(
    options: tuple[str, ...], out: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert run(monkeypatch, "validate", str(out), *options) == 2
    assert "has no effect" in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect",), "Missing argument"),
        (("validate", "x", "--level", "foo"), "foo"),
        (("nosuchverb",), "nosuchverb"),
        (("bench", "x", "--nosuch"), "--nosuch"),
    ],
)
def test_a_wrong_command_line_has_a_code_and_goes_to_the_log_as_any_error(
    arguments: tuple[str, ...], words: str, monkeypatch: Any, capsys: Any
) -> None:
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert "DCR-U000" in err
    assert words in err


def test_without_a_verb_the_help_is_shown(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch) in (0, 2)
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err
    assert "DCR-" not in captured.out + captured.err


def test_interrupted_while_loading_it_says_so_in_one_line() -> None:
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'diffcr_compile.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from diffcr_compile.__main__ import run\n"
        "run()\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 130
    assert found.stderr == "Interrupted before anything was done.\n"


def test_a_terminal_of_ascii_alone_loses_a_sign_and_not_the_result(out: Path) -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    program = (
        "from diffcr_compile.commands.terminal import say, terminal\n"
        "terminal.start()\nsay('a\u2026b')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=ascii_only
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == b"a?b\n"


def test_unroutable_model_leaves_with_3_and_reasons(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    code = run(
        monkeypatch, "compile", "python:tests.test_cli:unroutable", "-o", str(tmp_path / "o")
    )
    assert code == 3
    assert "blocks.0: " in capsys.readouterr().err


def test_small_budget_leaves_with_2_and_names_the_smallest(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    arguments = (
        "compile",
        "python:tests.test_cli:tiny",
        "-o",
        str(tmp_path / "o"),
        "--budget",
        "5%",
    )
    assert run(monkeypatch, *arguments) == 2
    assert "smallest reachable budget is" in " ".join(capsys.readouterr().err.split())


def test_changed_file_leaves_with_7(
    out: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    weights = copy / "onnx/weights.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(bytes(data))
    for command in ("validate", "bench"):
        assert run(monkeypatch, command, str(copy)) == 7
        assert "weights.bin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compile", "nonsense"), "MODEL must be"),
        (("compile", "python:no.such:thing"), "cannot be imported"),
        (("compile", "diffusers:/nowhere"), "--inputs"),
        (("compile", "demo", "--set", "calibration.stepz=3"), "stepz"),
        (("compile", "demo", "--set", "calibration.steps"), "key=value"),
        (("compile", "demo", "--steps", "3", "--set", "calibration.steps=4"), "given twice"),
        (("calibrate", "demo", "--steps", "-1"), "calibration.steps"),
        (("compile", "demo", "--budget", "lots"), "budget must be like"),
        (("report", "/nowhere"), "does not exist"),
        (("demo", "--no-such-option"), "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_usage_errors_leave_with_2(
    arguments: tuple[str, ...], words: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("verb", ["compile", "calibrate", "demo"])
def test_steps_is_a_setting(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``--steps 0 --set x=y`` is ``--set x=y --set calibration.steps=0``."""
    from diffcr_compile.commands import compile as compile_verb
    from diffcr_compile.commands import demo, stages

    seen: list[Any] = []

    def made(
        model: str, out: Path, config: Any, set_: list[str], *rest: Any, **more: Any
    ) -> Any:
        seen.append(set_)
        raise KeyboardInterrupt

    for module in (compile_verb, demo, stages):
        monkeypatch.setattr(module, "make_job", made)
    model = [] if verb == "demo" else ["python:tests.test_cli:tiny"]
    arguments = (*model, "-o", str(tmp_path), "--steps", "0", "--set", "routing.buckets=2")
    assert run(monkeypatch, verb, *arguments) == 130
    assert seen == [["routing.buckets=2", "calibration.steps=0"]]


def test_missing_artifact_leaves_with_7(monkeypatch: Any, tmp_path: Path) -> None:
    assert run(monkeypatch, "validate", str(tmp_path)) == 7


def test_doctor_lists_what_is_missing(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "doctor", "--json") == 0
    rows = {row["name"]: row["version"] for row in json.loads(capsys.readouterr().out)}
    assert rows["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_missing_onnxruntime_is_said_before_any_work(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ["compile", "python:tests.test_cli:tiny", "-o", str(tmp_path / "out"), *SMALL]
    assert run(monkeypatch, *arguments) == 4
    assert "diffcr-compile[cpu]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [["demo"], ["inspect", "demo"], ["inspect", "diffusers:{}"]])
def test_without_diffusers(
    verb: list[str], monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    arguments = [word.format(tmp_path) for word in verb]
    assert run(monkeypatch, *arguments) == 4
    said = capsys.readouterr().err
    assert "DCR-E012" in said
    assert "diffcr-compile[diffusers]" in said


# diffusers has a dummy in the place of the first as long as librosa is not installed
@pytest.mark.parametrize(
    ("name", "found"),
    [("AudioDiffusionPipeline", "librosa"), ("PipelineOfTheFuture", "saved with 99.0")],
)
def test_a_pipeline_that_this_diffusers_cannot_have(
    name: str, found: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    index = {"_class_name": name, "_diffusers_version": "99.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert run(monkeypatch, "inspect", f"diffusers:{tmp_path}") == 4
    said = capsys.readouterr().err
    assert "DCR-E012" in said
    assert found in said


def test_ctrl_c_leaves_with_130_and_the_command_to_go_on(
    monkeypatch: Any, capsys: Any
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # inside of a verb, where Typer would see it first
    monkeypatch.setattr("diffcr_compile.reference.demo.load_reference_dit", interrupt)
    assert run(monkeypatch, "demo", "-o", "somewhere") == 130
    assert "diffcr demo -o somewhere" in capsys.readouterr().err


def test_diffusers_folder_with_inputs(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, inputs = models.tiny_dit()
    model.save_pretrained(tmp_path / "saved")
    save_file(dict(inputs), tmp_path / "inputs.safetensors")
    arguments = (
        "inspect",
        f"diffusers:{tmp_path / 'saved'}",
        "--inputs",
        str(tmp_path / "inputs.safetensors"),
        "--json",
    )
    assert run(monkeypatch, *arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"]) == 3
