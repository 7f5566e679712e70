"""``diffcr doctor --device`` on the files of boards, laid out in a folder; no board is needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diffcr_compile import cli
from diffcr_compile.device_doctor import Finding, examine_device
from diffcr_compile.device_state import read_board
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.engine_plan import plan_engines
from diffcr_compile.manifest import read_manifest
from diffcr_compile.runtime.device import Device
from diffcr_compile.runtime.engine_files import (
    OK_FILE,
    PlanFile,
    Sidecar,
    made_from,
    plan_file,
    read_sidecar,
    write_ok,
    write_sidecar,
)
from tests import device_artifact as small

SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
NVPMODEL = (
    "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=15W >\n"
)
ORIN: dict[str, str] = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "var/lib/dpkg/status": (
        "Package: libc6\nStatus: install ok installed\nVersion: 2.35\n\n"
        "Package: libnvinfer10\nStatus: install ok installed\nPriority: optional\nVersion: 10.3.0.30-1+cuda12.5\n"
    ),
    "usr/src/tensorrt/bin/trtexec": "",
    "etc/nvpmodel.conf": NVPMODEL,
    "var/lib/nvpmodel/status": "pmode:0000",
    "sys/class/devfreq/17000000.gpu/min_freq": "1020000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "proc/meminfo": "MemTotal:        7800000 kB\nMemFree: 100 kB\nMemAvailable:    6000000 kB\n",
    "proc/swaps": f"{SWAPS}/swapfile file 16777212 0 -2\n",
    "proc/812/comm": "systemd\n",
}
PRESENT = {"numpy": "1.21.5", "tensorrt": "10.3.0", "cuda": "12.6.2", "onnxruntime": "1.19.2"}


def board(root: Path, **changes: str | None) -> Path:
    """The files of a well set Orin Nano with some changed; None takes one away."""
    files: dict[str, str | None] = {
        **ORIN,
        **{k.replace("__", "/"): v for k, v in changes.items()},
    }
    for name, text in files.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


def examine(
    root: Path, artifact: Path | None = None, modules: Mapping[str, str] = PRESENT
) -> dict[str, Finding]:
    return {f.name: f for f in examine_device(artifact, root, modules.get)}


def test_a_well_set_board_is_described_and_only_the_known_bugs_are_warned_of(
    tmp_path: Path,
) -> None:
    found = examine(board(tmp_path))
    assert found["board"].found == "NVIDIA Jetson Orin Nano Developer Kit, SM87"
    assert found["L4T"].found == "36.4.3, JetPack 6.1 or 6.2"
    assert found["TensorRT"].found == "10.3.0.30-1+cuda12.5"
    assert found["trtexec"].found == "/usr/src/tensorrt/bin/trtexec"
    assert found["power mode"].found == "MAXN"
    assert found["clocks"].found == "fixed at their top"
    assert found["memory"].found == "8.0 GB, 6.1 GB available to a program"
    assert found["swap"].found == "17.2 GB on a disk, 0.0 GB of ZRAM"
    assert found["desktop"].found == "does not run"
    assert [f.name for f in found.values() if f.level != "ok"] == ["TensorRT"]
    assert "--mode profiles" in found["TensorRT"].consequence


CASES: list[tuple[str, str, str, dict[str, str | None]]] = [
    ("TensorRT", "fails", "diffcr build, build_on_device.sh and every engine",
     {"var/lib/dpkg/status": "Package: libc6\nStatus: install ok installed\nVersion: 2\n"}),
    ("TensorRT", "fails", "JetPack 6.1 or 6.2 brings 10.3",
     {"var/lib/dpkg/status": "Package: libnvinfer10\nStatus: deinstall ok config-files\nVersion: 10.3.0.30\n"}),
    ("TensorRT", "fails", "read from 10.3|reads from 10.3",
     {"var/lib/dpkg/status": "Package: libnvinfer8\nStatus: install ok installed\nVersion: 8.6.2.3-1+cuda12.2\n"}),
    ("trtexec", "warning", "build_on_device.sh", {"usr/src/tensorrt/bin/trtexec": None}),
    ("power mode", "warning", "latency", {"var/lib/nvpmodel/status": "pmode:0001"}),
    ("clocks", "warning", "jetson_clocks", {"sys/class/devfreq/17000000.gpu/min_freq": "306000000\n"}),
    ("swap", "warning", "diffcr build may be killed",
     {"proc/swaps": f"{SWAPS}/dev/zram0 partition 1000000 0 5\n/dev/zram1 partition 1000000 0 5\n"}),
    ("desktop", "warning", "memory that the GPU shares", {"proc/1033/comm": "gnome-shell\n"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "level", "words", "changes"), CASES)
def test_what_is_wrong_is_found_with_the_command_that_suffers(
    tmp_path: Path, name: str, level: str, words: str, changes: dict[str, str | None]
) -> None:
    finding = examine(board(tmp_path, **changes))[name]
    assert finding.level == level
    text = f"{finding.consequence} {finding.remedy}"
    assert any(word in text for word in words.split("|"))
    assert finding.consequence
    assert finding.remedy


@pytest.mark.parametrize("name", ["numpy", "tensorrt", "cuda"])
def test_a_module_that_is_missing_names_who_needs_it(tmp_path: Path, name: str) -> None:
    modules = {key: value for key, value in PRESENT.items() if key != name}
    finding = examine(board(tmp_path), modules=modules)[name]
    assert finding.level == "fails"
    assert finding.remedy
    without_ort = {k: v for k, v in PRESENT.items() if k != "onnxruntime"}
    assert examine(board(tmp_path), modules=without_ort)["onnxruntime"].level == "warning"


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R35 (release), REVISION: 6.0, GCID: 1", "35.6.0", "5"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", "36.3.0", "6.0"),
        ("# R38 (release), REVISION: 2.1, GCID: 1", "38.2.1", "7.0"),
        ("# R38 (release), REVISION: 4.0, GCID: 1", "38.4.0", "7.1"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "39.2.0", "7.2"),
        ("# R32 (release), REVISION: 7.1, GCID: 1", "32.7.1", None),
        ("something else", None, None),
    ],
)
def test_l4t_tells_the_jetpack(
    tmp_path: Path, release: str, l4t: str | None, jetpack: str | None
) -> None:
    found = read_board(board(tmp_path, **{"etc/nv_tegra_release": release}))
    assert (found.l4t, found.jetpack) == (l4t, jetpack)


def test_a_machine_that_is_no_board_is_told_so(tmp_path: Path) -> None:
    found = examine(tmp_path)
    assert found["board"].found == "no Jetson"
    assert "runs here only" in found["board"].consequence


def with_memory(artifact: Path, weights: int, activations: int) -> Path:
    """The artifact as if it had weights of that size."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "model/activation_memory.json").unlink(missing_ok=True)
    rows = [{"plain": activations, "fused": activations}] * 4
    write_json_atomic(artifact / "model/activation_memory.json", rows)
    from diffcr_compile.manifest import Manifest, hash_files, write_manifest

    del manifest["checksum"]
    manifest["files"] = hash_files(artifact)
    manifest["files"]["onnx/weights.bin"]["bytes"] = weights
    write_manifest(artifact, Manifest(**manifest))
    return artifact


def test_an_artifact_that_is_too_large_names_the_command_that_will_fail(
    tmp_path: Path,
) -> None:
    # 3 GB of weights: three copies are 9 GB, a build takes 9.9 GB
    out = with_memory(small.write(tmp_path / "out"), 3_000_000_000, 10_000_000)
    found = examine(board(tmp_path / "board"), out)
    apart, shared = found["out, per_bucket"], found["out, profiles"]
    assert apart.level == "fails"
    assert "Load with swap=True (3.02 GB)" in apart.consequence
    assert "the build will be killed" not in apart.consequence  # there are 17 GB of swap
    assert shared.level == "ok"
    no_swap = examine(board(tmp_path / "zram", **{"proc/swaps": SWAPS}), out)
    assert "the build will be killed" in no_swap["out, profiles"].consequence


FILES = {"profiles_00": PlanFile("0" * 64, 1)}


def with_engines(folder: Path, sidecar: Sidecar) -> None:
    """A folder of engines that were compared with the golden outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sidecar.files:
        (folder / plan_file(name)).write_bytes(b"p")
    write_sidecar(folder, sidecar)
    rows = [{"bucket": 0, "passed": True}]
    write_ok(folder, read_sidecar(folder), rows, "now")


def test_engines_that_a_load_would_refuse_are_named(tmp_path: Path) -> None:
    out = small.write(tmp_path / "out")
    manifest = read_manifest(out)
    nano = ORIN["proc/device-tree/model"].rstrip("\0")
    device = Device("Orin", 87, "tensorrt", "10.3.0", nano, 8)
    folder, plan = out / "engines" / device.folder, plan_engines(manifest, "profiles")
    here = board(tmp_path / "board")

    def found(sidecar: Sidecar) -> Any:
        with_engines(folder, sidecar)
        return examine(here, out)[device.folder]

    fine = Sidecar(device, made_from(manifest), plan, FILES, {}, False, "now")
    assert found(fine).level == "ok"
    (folder / OK_FILE).unlink()
    assert (
        "not compared with the golden outputs" in examine(here, out)[device.folder].consequence
    )
    other = found(dataclasses.replace(fine, made_from="0" * 64))
    assert "made from other graphs" in other.consequence
    early = found(dataclasses.replace(fine, ahead_of_time=True))
    assert "built ahead of time" in early.consequence
    assert found(fine).level == "ok"
    (folder / plan_file("profiles_00")).unlink()
    assert (examine(here, out)[device.folder].level, other.level) == ("fails", "fails")


def test_engines_of_another_device_or_tensorrt_are_named(tmp_path: Path) -> None:
    out = small.write(tmp_path / "out")
    manifest = read_manifest(out)
    plan = plan_engines(manifest, "profiles")
    nano = ORIN["proc/device-tree/model"].rstrip("\0")
    for device in (
        Device("Orin", 87, "tensorrt", "10.3.0", nano, 8),
        Device("Orin", 87, "tensorrt", "10.16.1", nano, 8),
        Device("Orin NX", 87, "tensorrt", "10.3.0", "NVIDIA Jetson Orin NX", 16),
        Device("Thor", 110, "tensorrt", "10.3.0", "NVIDIA Jetson Thor", 128),
    ):
        folder = out / "engines" / device.folder
        folder.mkdir(parents=True)
        with_engines(
            folder, Sidecar(device, made_from(manifest), plan, FILES, {}, False, "now")
        )
    found = examine(board(tmp_path / "board"), out)
    assert found["orin_sm87_trt10.3.0"].level == "ok"
    assert "here is 10.3.0.30" in found["orin_sm87_trt10.16.1"].consequence
    other = found["orin-nx_sm87_trt10.3.0"].consequence
    assert f"the board NVIDIA Jetson Orin NX, here is {nano}" in other
    assert "16 GB of memory, here are 8 GB" in other
    assert "SM110, this board is SM87" in found["thor_sm110_trt10.3.0"].consequence


def test_the_verb_prints_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["diffcr", "doctor", "--device", "--json"])
    cli.main()
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "found", "level", "consequence", "remedy"} == set(rows[0])
    monkeypatch.setattr(sys, "argv", ["diffcr", "doctor", "out"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
