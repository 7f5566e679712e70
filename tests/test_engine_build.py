"""``diffcr build`` and ``build_on_device.sh``: TensorRT-RTX ahead of time, trtexec as a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffcr_compile import cli
from diffcr_compile.engine_plan import ENGINE_MODES, EngineMode, ProfileLayout, plan_engines
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.export.device.script import write_script
from diffcr_compile.export.device.trtexec import trtexec_lines
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.runtime import load
from diffcr_compile.runtime.engine_files import made_from
from tests import device_artifact as small

FAKES = Path(__file__).parent / "fakes"
# What a device without Python and this package has.
TOOLS = ("sh", "sha256sum", "mkdir", "mv", "rm", "cat", "tail", "dirname", "tr")
TRTEXEC = """\
#!/bin/sh
# Records its arguments, one a line, and writes what the engine would be.
case "$1" in --help) cat "$RECORD/help"; exit 0 ;; esac
{ printf '%s\\n' "$@"; echo; } >>"$RECORD/calls"
for argument; do
  case "$argument" in
    --saveEngine=*) plan=${argument#--saveEngine=} ;;
    --onnx=*) onnx=${argument#--onnx=} ;;
  esac
done
[ -f "$onnx" ] || exit 9
case "$onnx" in *"${KILL:-none}"*) kill -9 $$ ;; esac
case "$onnx" in *"${FAIL:-none}"*) echo "Error: no importer for NonZero"; exit 1 ;; esac
echo "engine of $onnx" >"$plan"
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture
def out(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "an artifact's folder"))


class Shell:
    """A device with trtexec, coreutils and nothing else on the path."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        self.record = folder / "record"
        self.artifact = artifact
        self.path = folder / "bin"
        self.record.mkdir()
        self.path.mkdir()
        (self.record / "help").write_text(
            "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --help\n"
            "  --stronglyTyped   Create a strongly typed network"
        )
        (self.path / "trtexec").write_text(TRTEXEC)
        (self.path / "trtexec").chmod(0o755)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.path / tool).symlink_to(found)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(self.artifact / "build_on_device.sh"), *arguments],
            env={"PATH": str(self.path), "RECORD": str(self.record), **environment},
            capture_output=True,
            text=True,
            cwd="/",
        )

    def calls(self) -> list[list[str]]:
        """Arguments of each call of trtexec."""
        path = self.record / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.splitlines() for call in text.split("\n\n") if call.strip()]


@pytest.fixture
def shell(tmp_path: Path, out: Path) -> Shell:
    write_script(out, read_manifest(out))
    return Shell(tmp_path, out)


def profiles_of(call: list[str]) -> list[tuple[dict[str, tuple[int, ...]], ...]]:
    """Min, opt and max shapes of the profiles that a call of trtexec asks for, read back independently."""
    found: list[dict[str, dict[str, tuple[int, ...]]]] = []
    for argument in call:
        key, _, value = argument.partition("=")
        if key == "--profile":
            assert int(value) == len(found)
            found.append({})
        elif key in ("--minShapes", "--optShapes", "--maxShapes"):
            pairs = (item.rsplit(":", 1) for item in value.split(","))
            found[-1][key] = {n: tuple(map(int, s.split("x"))) for n, s in pairs}
    return [
        tuple(profile[f"--{which}Shapes"] for which in ("min", "opt", "max"))
        for profile in found
    ]


def wanted(
    manifest: Manifest, mode: EngineMode, layout: ProfileLayout
) -> list[tuple[str, list[tuple[dict[str, Any], ...]]]]:
    """Graph and kept tokens (min, opt, max) of each engine, from the manifest alone."""
    kept = manifest.schedule["a"]
    if mode == "per_bucket":
        return [(path, []) for path in dict.fromkeys(b["onnx"] for b in manifest.buckets)]
    (row,) = manifest.profile_graphs
    pinned = [({small.LENGTH: (k,)},) * 3 for k in dict.fromkeys(kept)]
    least, median, most = min(kept), sorted(set(kept))[len(set(kept)) // 2], max(kept)
    spanning = [tuple({small.LENGTH: (k,)} for k in (least, median, most))]
    return [(row["onnx"], pinned if layout == "pinned" else spanning)]


# --------------------------------------------------------------------------------- the script


def test_shellcheck_finds_nothing(out: Path) -> None:
    path = write_script(out, read_manifest(out))
    # installed with the dev extra; a missing one is a failure, not a skip
    checker = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [
            str(checker),
            "--shell=sh",
            "--enable=all",
            "--exclude=SC2250,SC2310,SC2312",
            str(path),
        ],
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("layout", ["pinned", "spanning"])
@pytest.mark.parametrize("mode", ENGINE_MODES)
def test_the_script_asks_trtexec_for_exactly_the_profiles_of_the_manifest(
    shell: Shell, mode: EngineMode, layout: ProfileLayout
) -> None:
    write_script(shell.artifact, read_manifest(shell.artifact), layout=layout)
    done = shell.run(mode)
    assert done.returncode == 0, done.stderr
    asked = [
        (
            next(a for a in call if a.startswith("--onnx=")).removeprefix("--onnx="),
            profiles_of(call),
        )
        for call in shell.calls()
    ]
    assert asked == wanted(read_manifest(shell.artifact), mode, layout)
    for call in shell.calls():
        assert {"--stronglyTyped", "--noTF32", "--skipInference"} <= set(call)
        assert len({a.partition("=")[0] for a in call if a != ""}) >= 5
    plans = sorted((shell.artifact / "engines/unchecked").glob("*.plan"))
    assert len(plans) == len(asked)


def test_the_script_builds_every_bucket_apart_unless_told_otherwise(shell: Shell) -> None:
    assert shell.run().returncode == 0
    assert len(shell.calls()) == 3
    write_script(shell.artifact, read_manifest(shell.artifact), "profiles")
    assert shell.run().returncode == 0
    assert len(shell.calls()) == 4


def test_a_second_run_builds_nothing_and_one_after_a_kill_goes_on(shell: Shell) -> None:
    killed = shell.run(KILL="bucket_01")
    assert killed.returncode == 5
    assert "bucket_01 was killed: memory ran out" in killed.stderr
    assert len(shell.calls()) == 2
    done = shell.run()
    assert done.returncode == 0, done.stderr
    assert "bucket_00: built already" in done.stdout
    assert [call[0] for call in shell.calls()] == [
        f"--onnx=onnx/bucket_0{n}.onnx" for n in (0, 1, 1, 2)
    ]
    assert shell.run().stdout.count("built already") == 3
    assert len(shell.calls()) == 4


def test_engines_of_another_tensorrt_are_built_again(shell: Shell) -> None:
    help_file = shell.record / "help"
    for text, calls in (
        ("[TensorRT v100300]", 1),
        ("[TensorRT v100300] [b26] # /elsewhere/trtexec", 1),
        ("[TensorRT v101300]", 2),
        ("a banner without a version", 3),
        ("another banner without a version", 3),
    ):
        help_file.write_text(f"&&&& RUNNING TensorRT.trtexec {text}\n--stronglyTyped")
        assert shell.run("profiles").returncode == 0
        assert len(shell.calls()) == calls
    (shell.path / "trtexec").write_text(f"{TRTEXEC}# another build of it\n")
    assert shell.run("profiles").returncode == 0
    assert len(shell.calls()) == 4


def test_engines_of_another_board_are_built_again(shell: Shell, tmp_path: Path) -> None:
    model, script = tmp_path / "model", shell.artifact / "build_on_device.sh"
    script.write_text(script.read_text().replace("/proc/device-tree/model", str(model)))
    for name, calls in (
        (None, 1),
        (b"NVIDIA Jetson AGX Orin\0", 2),
        (b"NVIDIA Jetson AGX Orin\0", 2),
        (b"NVIDIA Jetson Orin NX\0", 3),
    ):
        if name is not None:
            model.write_bytes(name)
        done = shell.run("profiles")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(shell.calls()) == calls
        found = (shell.artifact / "engines/unchecked/board").read_bytes()
        assert found == (name or b"").rstrip(b"\0") + b"\n"


def test_the_script_says_which_artifact_its_engines_are_of(shell: Shell) -> None:
    assert shell.run().returncode == 0
    found = (shell.artifact / "engines/unchecked/made_from").read_text().strip()
    assert found == made_from(read_manifest(shell.artifact))
    mode = shell.artifact / "engines/unchecked/mode"
    assert mode.read_text() == "per_bucket pinned\n"
    assert shell.run("profiles", KILL="profiles").returncode == 5
    assert not mode.exists()  # what a run left that did not end is not taken


def test_a_plan_that_was_changed_and_other_settings_are_built_again(shell: Shell) -> None:
    shell.run("profiles")
    (plan,) = (shell.artifact / "engines/unchecked").glob("*.plan")
    plan.write_text("something else")
    shell.run("profiles")
    assert len(shell.calls()) == 2
    settings = BuildSettings(workspace_mb=512)
    write_script(shell.artifact, read_manifest(shell.artifact), settings=settings)
    shell.run("profiles")
    assert len(shell.calls()) == 3
    assert "--memPoolSize=workspace:512" in shell.calls()[-1]


def test_files_are_checked_before_anything_is_built(shell: Shell) -> None:
    path = shell.artifact / "onnx/weights.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = shell.run()
    assert done.returncode == 7
    assert "differs from the manifest" in done.stderr
    assert shell.calls() == []


def test_what_trtexec_refuses_is_shown(shell: Shell) -> None:
    done = shell.run(FAIL="bucket_02")
    assert done.returncode == 3
    assert "no importer for NonZero" in done.stderr
    assert "could not build bucket_02 (status 1)" in done.stderr


def test_without_trtexec_or_with_a_wrong_mode_it_says_what_to_do(shell: Shell) -> None:
    assert shell.run("both").returncode == 2
    (shell.path / "trtexec").unlink()
    done = shell.run()
    assert done.returncode == 4
    assert "apt install tensorrt" in done.stderr


def test_tensorrt_11_is_not_given_an_option_that_it_lacks(shell: Shell) -> None:
    (shell.record / "help").write_text("  --decomposableAttentions")
    assert (
        shell.run("profiles", TRTEXEC_ARGS="--verbose --builderOptimizationLevel=2").returncode
        == 0
    )
    (call,) = shell.calls()
    assert "--stronglyTyped" not in call
    assert call[-2:] == ["--verbose", "--builderOptimizationLevel=2"]


def test_the_printed_lines_say_what_the_script_does(shell: Shell) -> None:
    manifest = read_manifest(shell.artifact)
    for mode in ENGINE_MODES:
        lines = trtexec_lines(plan_engines(manifest, mode), BuildSettings())
        (shell.record / "calls").unlink(missing_ok=True)
        shell.run(mode)
        for line, call in zip(lines, shell.calls(), strict=True):
            words = subprocess.run(
                ["sh", "-c", f'for a in {line.removeprefix("trtexec ")}; do echo "$a"; done'],
                capture_output=True,
                text=True,
            ).stdout.splitlines()
            assert {w for w in words if not w.startswith("--saveEngine")} == {
                w for w in call if not w.startswith("--saveEngine")
            }


# --------------------------------------------------------------------------------- diffcr build


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diffcr", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_without_a_gpu_engines_are_built_ahead_of_time_and_refused_by_the_runtime(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = ("build", str(out), "--target", "jetson-agx-orin@jp7.2", "--json")
    assert run(monkeypatch, *command, "--mode", "profiles") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"] is False
    assert Path(found["folder"]).name.startswith("none_sm86_rtx")
    assert (Path(found["folder"]) / "profiles_00.plan").stat().st_size > 1000
    assert not (Path(found["folder"]) / "engine.ok.json").exists()
    assert len(found["trtexec"]) == 1
    assert os.access(out / "build_on_device.sh", os.X_OK)
    old = Path(found["folder"]) / "bucket_09.plan"  # of an earlier build in the other mode
    old.write_bytes(b"engine")
    assert run(monkeypatch, *command, "--mode", "profiles") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == ["profiles_00"]
    assert not old.exists()


def test_engines_built_ahead_of_time_do_not_run_even_where_their_device_is(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import tensorrt_rtx

    arguments = ("--target", "rtx", "--mode", "profiles", "--compute-capability", "SM86")
    assert run(monkeypatch, "build", str(out), *arguments) == 0
    assert "unverified: built ahead of time" in capsys.readouterr().out
    (folder,) = (out / "engines").iterdir()
    sm = json.loads((folder / "engine.json").read_text())["device"]["sm"]
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_CUDA_SM", str(sm))
    version = tensorrt_rtx.__version__
    folder.rename(folder.with_name(f"orin_sm{sm}_rtx{version}"))
    from diffcr_compile.errors import ArtifactError

    with pytest.raises(
        ArtifactError, match="built ahead of time and never compared"
    ) as caught:
        load(out, backend="tensorrt-rtx")
    assert caught.value.exit_code == 7
    forget()


def workers(out: Path) -> list[str]:
    """Command lines of processes that build for an artifact."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if "device.worker" in line and str(out) in line:
            found.append(line)
    return found


def test_two_builds_of_one_artifact_do_not_meet(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import fcntl

    import tensorrt_rtx

    folder = out / f"engines/none_sm86_rtx{tensorrt_rtx.__version__}"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ("build", str(out), "--target", "jetson-orin-nx", "--mode", "profiles")
        assert run(monkeypatch, *command) == 2
    assert "another diffcr run is at work" in " ".join(capsys.readouterr().err.split())


def test_on_the_device_the_verb_builds_checks_and_the_engines_run(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    command = ("build", str(out), "--target", "jetson-agx-orin@jp6.2", "--json")
    assert run(monkeypatch, *command, "--mode", "profiles") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"] is True
    assert found["device"] == "Orin (8 GB), SM87, tensorrt 10.3.0"
    assert [row["bucket"] for row in found["buckets"]] == [0, 1, 2, 3]
    inputs = small.call(900.0)
    np.testing.assert_allclose(
        load(out, backend="tensorrt")(**inputs), small.expected(inputs, 3), atol=1e-5
    )
    assert run(monkeypatch, "validate", str(out), "--level", "engine") == 0
    assert "the engines may be used" in capsys.readouterr().out
    forget()


def test_engines_that_may_not_run_end_a_command_with_7_and_the_rebuild_line(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    for command in (
        ["run", str(out), "--backend", "tensorrt"],
        ["validate", str(out), "--level", "engine"],
    ):
        assert run(monkeypatch, *command) == 7
        assert f"diffcr build {out}" in " ".join(capsys.readouterr().err.split())
    forget()


def forget() -> None:
    """The stand-ins are of one test only."""
    for name in [n for n in sys.modules if n in ("tensorrt", "cuda") or n.startswith("cuda.")]:
        del sys.modules[name]


def test_a_build_that_is_killed_goes_on_at_the_bucket_it_was_in(out: Path) -> None:
    command = [
        sys.executable, "-m", "diffcr_compile", "build", str(out), "--target", "rtx",
        "--mode", "per_bucket", "--compute-capability", "SM86", "--json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(1200):
            finished = sorted(p.name for p in out.glob("engines/*/*.built.json"))
            if finished or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    finished = sorted(p.name for p in out.glob("engines/*/*.built.json"))
    assert finished
    for _ in range(200):  # the process of the build ends with the one that waited for it
        if not workers(out):
            break
        time.sleep(0.05)
    assert workers(out) == []
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert set(found["kept"]) >= {name.removesuffix(".built.json") for name in finished}
    assert set(found["bytes"]) == {"bucket_00", "bucket_01", "bucket_02"}
    assert list(Path(found["folder"]).glob("*.partial")) == []


def test_a_dry_run_prints_the_lines_and_writes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = sorted(out.rglob("*"))
    assert run(monkeypatch, "build", str(out), "--target", "jetson-orin-nx", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "mode per_bucket: " in text
    assert text.count("trtexec --onnx=onnx/bucket_0") == 3
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "layout", "count", "words"),
    [
        (["--target", "rtx"], "spanning", 1, "specialises for the lengths that it meets"),
        (["--target", "rtx", "--layout", "pinned"], "pinned", 3, "chosen for its lengths"),
        (["--target", "jetson-thor@jp7.2"], "pinned", 3, "chosen for its lengths"),
    ],
)
def test_the_target_says_how_profiles_are_laid_out_unless_told_otherwise(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    layout: str,
    count: int,
    words: str,
) -> None:
    command = ["build", str(out), *arguments, "--mode", "profiles", "--dry-run", "--json"]
    assert run(monkeypatch, *command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == layout
    assert words in found["reason"]
    assert len(found["plan"]["engines"][0]["profiles"]) == count
    assert found["trtexec"][0].count("--profile=") == count


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--target", "onnxruntime-cpu"], 2),
        (["--target", "jetson-agx-orn"], 2),
        (["--target", "rtx", "--compute-capability", "SM99"], 2),
        (["--target", "rtx", "--compute-capability", "orin"], 2),
        (["--target", "rtx"], 2),
        (["--target", "rtx", "--mode", "both"], 2),
    ],
)
def test_what_cannot_be_built_is_a_usage_error(
    out: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    assert run(monkeypatch, "build", str(out), *arguments) == code


def test_without_any_tensorrt_the_script_is_there_and_the_error_names_it(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run(monkeypatch, "build", str(out), "--target", "jetson-orin-nx") == 4
    assert "sh build_on_device.sh" in " ".join(capsys.readouterr().err.split())
    assert (out / "build_on_device.sh").is_file()


def test_another_gpu_than_the_targets_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_CUDA_SM", "90")
    assert run(monkeypatch, "build", str(out), "--target", "jetson-orin-nx") == 2
    assert "must be built on the device that runs it" in " ".join(
        capsys.readouterr().err.split()
    )
    for name in [n for n in sys.modules if n in ("tensorrt", "cuda") or n.startswith("cuda.")]:
        del sys.modules[name]
