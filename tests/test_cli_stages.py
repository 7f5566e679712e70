"""The verbs stage by stage, ``--dry-run`` of every verb, ``init`` and ``diff``."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import diffcr_compile
from diffcr_compile import cli
from diffcr_compile.commands import progress as progress_module
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.config_file import load_config
from diffcr_compile.config_text import commented_yaml, json_schema
from diffcr_compile.errors import EnvironmentMissingError
from tests import models
from tests.test_cli import SMALL, run

TINY = "python:tests.test_cli_stages:tiny"
ROOT = Path(__file__).resolve().parent.parent


def tiny() -> Any:
    return models.tiny_dit()


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stages ran one after the other."""
    out = tmp_path_factory.mktemp("stages") / "out"
    patch = pytest.MonkeyPatch()
    assert run(patch, "calibrate", TINY, "-o", str(out), "--budget", "70%", *SMALL) == 0
    assert {p.name for p in out.iterdir()} == {
        ".lock", "calibration", "effective_config.yaml", "model", "stages.json",
    }  # fmt: skip
    before = json.loads((out / "stages.json").read_text())["calibrate"]
    assert run(patch, "freeze", str(out)) == 0
    assert (out / "model/schedule.json").exists()
    assert run(patch, "export", str(out)) == 0
    patch.undo()
    # the later verbs took up what calibrate had done
    assert json.loads((out / "stages.json").read_text())["calibrate"] == before
    return out


def test_staged_verbs_end_in_an_artifact(staged: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "validate", str(staged), "--json") == 0
    assert all(row["passed"] for row in json.loads(capsys.readouterr().out))


def test_every_value_of_a_run_says_where_it_came_from(staged: Path) -> None:
    text = (staged / "effective_config.yaml").read_text()
    lines = {
        line.split(":")[0].strip(): line for line in text.splitlines() if line.startswith("  ")
    }
    assert lines["trajectories"].endswith("# --set")
    assert lines["budget"] == '  budget: "70%"  # flag'
    assert lines["model"] == f'  model: "{TINY}"  # flag'
    assert lines["gate"].endswith('"straight_through"  # default')
    values = yaml.safe_load(text)
    assert set(values) == set(CompileConfig.model_fields)
    for section, settings in values.items():
        assert set(settings) == set(type(getattr(CompileConfig(), section)).model_fields)
    again = load_config(staged / "effective_config.yaml")
    assert again.calibration.steps == 4
    assert again.origins["calibration.steps"] == str(staged / "effective_config.yaml")


def test_files_and_flags_and_the_verb_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "diffcr.yaml"
    path.write_text("routing: {buckets: 2}\nrun:\n")
    config = load_config(path, {"routing.multiple_of": 4}, {"export": {"batch": 8}})
    assert config.origins == {
        "routing.buckets": str(path), "routing.multiple_of": "--set", "export.batch": "the verb",
    }  # fmt: skip
    assert config.with_run("flag", model="demo", budget=None).origins["run.model"] == "flag"
    assert config.export.batch == 8


# ------------------------------------------------------------------------------- --dry-run

DRY: dict[str, str] = {
    "doctor": "",
    "init": TINY,
    "inspect": TINY,
    "compile": f"{TINY} -o new",
    "calibrate": f"{TINY} -o new",
    "freeze": "out",
    "export": "out",
    "validate": "out",
    "lint": "out",
    "build": "out --target jetson-agx-orin@jp6.2",
    "pack": "out -o model.zip",
    "bench": "out --steps 2 --repeats 1",
    "report": "out",
    "suggest": f"{TINY} --budgets 80%,60%",
    "run": "out",
    "show": "out",
    "diff": "out out",
    "demo": "-o new",
}
# Leave as without --dry-run: this artifact has no report, no baseline, or is not the reference model.
REFUSED = {"report": 2, "run": 2, "bench": 7}


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def verbs() -> set[str]:
    return {str(command.name) for command in cli.app.registered_commands}


def test_every_verb_is_tried_dry() -> None:
    assert set(DRY) == verbs()


@pytest.mark.parametrize("verb", sorted(DRY))
def test_a_dry_run_writes_nothing(
    verb: str, staged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(staged, tmp_path / "out")
    (tmp_path / "out/.lock").unlink()
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    status = run(monkeypatch, verb, *DRY[verb].split(), "--dry-run")
    assert tree(tmp_path) == before
    assert status == REFUSED.get(verb, 0)


def test_the_dry_run_of_a_compilation_says_what_it_would_do(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "compile", TINY, "-o", "new", "--budget", "50%", "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"would compile {TINY} into new, budget 50%" in said
    assert "blocks would be routed" in said


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("--budget 60", 2, "budget must be in"),
        ("--budget abc", 2, "budget must be like"),
        ("--budget 5%", 2, "smallest reachable budget"),
        ("--budget=", 2, "budget must be like"),
        ("--set routing.timestep_high=0", 2, "DCR-U032"),
        ("--set export.target=nosuch", 2, "nosuch"),
        ("--set export.cfg=batched --set export.batch=3", 0, ""),
        ("--learned-from nosuch", 7, "nosuch"),
        ("-o file/sub", 2, "file is a file"),
        ("-o file", 2, "file is a file"),
        ("-o foreign", 2, "not made by diffcr"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    arguments: str, status: int, words: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("foreign").mkdir()
    Path("foreign/mine").write_text("")
    before = tree(tmp_path)
    assert run(monkeypatch, "compile", TINY, *arguments.split(), "--dry-run") == status
    assert words in " ".join(capsys.readouterr().err.split())
    if status:  # and the run itself refuses it alike, before any work
        assert run(monkeypatch, "compile", TINY, *arguments.split()) == status
        assert words in " ".join(capsys.readouterr().err.split())
    assert "budget" in arguments or tree(tmp_path) == before


@pytest.mark.parametrize("verb", ["calibrate", "compile"])
def test_onnx_runtime_is_asked_for_where_graphs_are_compared_only(
    verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    status = run(monkeypatch, verb, TINY, "-o", str(tmp_path / "new"), "--dry-run")
    assert status == (0 if verb == "calibrate" else EnvironmentMissingError.exit_code)
    assert ("onnxruntime" in capsys.readouterr().err) == (verb == "compile")


def test_damaged_stages_are_named_by_the_dry_run_too(
    staged: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(staged, tmp_path / "out")
    (tmp_path / "out/stages.json").write_text('{"capture": ')
    assert run(monkeypatch, "freeze", str(tmp_path / "out"), "--dry-run") == 7
    assert "DCR-A002" in capsys.readouterr().err
    (tmp_path / "out/stages.json").unlink()  # as the message says
    assert run(monkeypatch, "freeze", str(tmp_path / "out"), "--dry-run") == 0
    assert run(monkeypatch, "freeze", str(tmp_path / "out")) == 0
    assert (tmp_path / "out/stages.json").exists()


# ------------------------------------------------------------------------- init and its schema


def test_init_prints_settings_that_can_be_used_as_they_are(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    assert run(monkeypatch, "init", TINY) == 0
    text = capsys.readouterr().out
    (tmp_path / "diffcr.yaml").write_text(text)
    config = load_config(tmp_path / "diffcr.yaml")
    assert config.run.model == TINY
    assert config.export.batch == 2
    assert config.run.budget
    assert "blocks can be routed" in text
    # every setting stands there; uncommented, the file says what it said before
    bare = "\n".join(line.replace("  # ", "  ", 1) if line.startswith("  # ") else line
                     for line in text.splitlines())  # fmt: skip
    for section, field in CompileConfig.model_fields.items():
        for name in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"  {name}: " in bare, f"{section}.{name}"
    (tmp_path / "bare.yaml").write_text(bare)
    assert load_config(tmp_path / "bare.yaml").model_dump() == config.model_dump()
    # and the file alone names the job
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "compile", "-c", "diffcr.yaml", "--dry-run") == 0
    assert f"would compile {TINY} into out" in capsys.readouterr().out


def test_detected_values_are_set_and_say_their_default() -> None:
    text = commented_yaml({"routing.timestep_high": 1.0}, ["a note"])
    assert "# a note" in text
    assert "  timestep_high: 1.0  # largest value of the model's timestep input; " in text
    assert "of a pipeline for what its steps say (default null)" in text
    assert yaml.safe_load(text)["routing"] == {"timestep_high": 1.0}


def test_the_committed_schema_is_the_one_of_the_code(monkeypatch: Any, capsys: Any) -> None:
    path = ROOT / "docs" / "diffcr.schema.json"
    assert json.loads(path.read_text()) == json_schema(), (
        "run: python -m diffcr_compile init --schema > docs/diffcr.schema.json"
    )
    assert run(monkeypatch, "init", "--schema") == 0
    assert capsys.readouterr().out == path.read_text()


def test_init_without_a_model_says_what_it_takes(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "init") == 2
    assert "DCR-U001" in capsys.readouterr().err


def test_freeze_in_a_strange_folder_says_where_to_begin(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    for verb in ("freeze", "export"):
        assert run(monkeypatch, verb, str(tmp_path)) == 2
        assert "diffcr calibrate MODEL -o FOLDER" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- diff


def test_diff_shows_what_changed(
    staged: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    import shutil

    from diffcr_compile.manifest import Manifest, read_manifest, write_manifest

    assert run(monkeypatch, "diff", str(staged), str(staged)) == 0
    assert "no difference" in capsys.readouterr().out
    shutil.copytree(staged, tmp_path / "other")
    manifest = read_manifest(staged)
    block = next(iter(manifest.schedule))
    kept = [n - 8 for n in manifest.schedule[block]]
    changed = {**vars(manifest), "schedule": {**manifest.schedule, block: kept}}
    write_manifest(tmp_path / "other", Manifest(**changed))
    config = tmp_path / "other/effective_config.yaml"
    config.write_text(config.read_text().replace('budget: "70%"', 'budget: "60%"'))
    assert run(monkeypatch, "diff", str(staged), str(tmp_path / "other"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["change"] for row in found["kept tokens"]} == {-8}
    assert found["settings"] == [{"what": "run.budget", "a": "70%", "b": "60%"}]
    assert found["model"] == found["versions"] == found["files"] == []
    # the same settings, other numbers: another checkpoint, or a run that does not repeat itself
    graph = min(name for name in manifest.files if name.startswith("onnx/"))
    entry = {**manifest.files[graph], "sha256": "0" * 64}
    touched = {**vars(manifest), "files": {**manifest.files, graph: entry}}
    write_manifest(tmp_path / "other", Manifest(**touched))
    config.write_text((staged / "effective_config.yaml").read_text())
    assert run(monkeypatch, "diff", str(staged), str(tmp_path / "other"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in found["files"]] == ["sha256 of onnx/"]
    assert not any(rows for title, rows in found.items() if title != "files")
    assert run(monkeypatch, "diff", str(staged), str(tmp_path)) == 7


# -------------------------------------------------------------------------- shell and terminal


def test_completion_scripts_are_made_for_the_usual_shells(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for shell, word in (
        ("bash", "complete "),
        ("zsh", "#compdef diffcr"),
        ("fish", "complete "),
    ):
        monkeypatch.setenv("_DIFFCR_COMPLETE", f"source_{shell}")
        monkeypatch.setattr(sys, "argv", ["diffcr"])
        with pytest.raises(SystemExit):
            cli.app(prog_name="diffcr")
        assert word in capsys.readouterr().out
    monkeypatch.setenv("_DIFFCR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "diffcr cali")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.app(prog_name="diffcr")
    assert capsys.readouterr().out.split() == ["calibrate"]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_and_plain_lines_for_logs(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, legacy_windows=False)
    monkeypatch.setattr(progress_module, "errors", console)
    with progress_module.progress() as event:
        event("calibrate", 1, 4, {})
        event("calibrate", 4, 4, {})
    written = text.getvalue()
    assert ("\x1b" in written) is terminal
    if not terminal:
        assert "calibrate 4/4" in written
        assert "s left" in written


def test_make_config_takes_the_run_section_and_guesses_in_it() -> None:
    assert make_config({"run": {"model": "demo"}}).run.model == "demo"
    from diffcr_compile.errors import UsageError

    with pytest.raises(UsageError, match="did you mean 'model'"):
        make_config({"run": {"modle": "demo"}})


def test_the_public_function_of_each_stage_has_its_verb() -> None:
    assert {"calibrate", "freeze", "export", "inspect", "compile"} <= verbs()
    assert inspect.signature(diffcr_compile.compile).parameters["until"].default is None
