"""Which later command will fail on this board, and why: ``diffcr doctor --device``.

Standard library and the runtime only: this file goes on the device.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffcr_compile.device_state import JETPACKS, BoardState, read_board, version_numbers
from diffcr_compile.engine_plan import EngineMode, plan_engines
from diffcr_compile.errors import DiffCRError
from diffcr_compile.export.device.memory import memory_need, read_activations, verdicts
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.runtime.device import Device, same_memory
from diffcr_compile.runtime.engine_files import (
    ENGINES,
    SIDECAR,
    Sidecar,
    check_plans,
    is_checked,
    made_from,
    read_sidecar,
)

# Strong typing, INT64 inputs and the operators of the exported graphs.
OLDEST_TENSORRT = (10, 3)
# module -> (what needs it, how to get it)
_MODULES = {
    "numpy": ("everything", "sudo apt install python3-numpy"),
    "tensorrt": (
        "diffcr build, diffcr validate --level engine, load(backend='tensorrt')",
        "sudo apt install python3-libnvinfer; a virtual environment needs --system-site-packages",
    ),
    "cuda": (
        "diffcr validate --level engine, load(backend='tensorrt')",
        "pip install 'cuda-python>=12.6,<13' on JetPack 6, 'cuda-python>=13' on JetPack 7",
    ),
    "onnxruntime": ("load(backend='onnxruntime')", "pip install onnxruntime"),
}
# Without these nothing that belongs to the device runs; ONNX Runtime is a choice.
_NEEDED = ("numpy", "tensorrt", "cuda")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        found: what was found, in words.
        level: ``ok``, ``warning`` or ``fails``.
        consequence: which later command fails or suffers, and why; "" if none.
        remedy: what to do; "" if nothing.
    """

    name: str
    found: str
    level: str = "ok"
    consequence: str = ""
    remedy: str = ""


def examine_device(
    artifact: Path | None = None,
    root: Path = Path("/"),
    version_of: Callable[[str], str | None] | None = None,
) -> list[Finding]:
    """All findings.

    Args:
        artifact: whose memory need and engines are looked at too.
        root: below which the board's files lie.
        version_of: version of a Python module, None if it cannot be imported.
    """
    board = read_board(root)
    findings = [*_board(board), *_tensorrt(board), *_modules(version_of or _version)]
    findings += [*_power(board), *_memory(board)]
    if artifact is not None:
        findings += _artifact(artifact, board)
    return findings


def _board(board: BoardState) -> Iterator[Finding]:
    if board.model is None and board.l4t is None:
        yield Finding(
            "board",
            "no Jetson",
            "warning",
            "engines are built on the device that runs them: what is built here runs here only",
            "run this on the board",
        )
        return
    sm = f", SM{board.sm}" if board.sm else ""
    yield Finding("board", f"{board.model or 'unknown'}{sm}")
    if board.l4t is None:
        return
    jetpack = f", JetPack {board.jetpack}" if board.jetpack else ""
    yield Finding("L4T", f"{board.l4t}{jetpack}")


def _tensorrt(board: BoardState) -> Iterator[Finding]:
    version = board.tensorrt
    if version is None and board.l4t is not None:
        numbers = version_numbers(board.l4t)
        expected = next((t for first, _, t in JETPACKS if numbers >= first), None)
        yield Finding(
            "TensorRT",
            "no package of it is installed",
            "fails",
            "diffcr build, build_on_device.sh and every engine: there is no TensorRT"
            + (f" (JetPack {board.jetpack} brings {expected})" if expected else ""),
            "sudo apt install nvidia-jetpack, or tensorrt",
        )
    elif version is not None and version_numbers(version)[:2] < OLDEST_TENSORRT:
        yield Finding(
            "TensorRT",
            version,
            "fails",
            "diffcr build and build_on_device.sh: the graphs carry their types, which TensorRT reads from "
            f"{'.'.join(map(str, OLDEST_TENSORRT))} on",
            "install JetPack 6.1 or newer",
        )
    elif version is not None and version_numbers(version)[:2] == (10, 3):
        yield Finding(
            "TensorRT",
            version,
            "warning",
            "--mode profiles: wrong results with open lengths are known of 10.3; the check after the build "
            "refuses such engines",
            "build with --mode per_bucket, or install JetPack 7.2",
        )
    elif version is not None:
        yield Finding("TensorRT", version)
    if board.trtexec is not None:
        yield Finding("trtexec", board.trtexec)
    else:
        yield Finding(
            "trtexec",
            "not found",
            "fails" if version is None else "warning",
            "build_on_device.sh: it calls trtexec",
            "sudo apt install libnvinfer-bin, or set TRTEXEC to its path",
        )


def _modules(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", f"{python}, {sys.executable}")
    for name, (needed_for, remedy) in _MODULES.items():
        version = version_of(name)
        if version is not None:
            yield Finding(name, version)
        else:
            level = "fails" if name in _NEEDED else "warning"
            yield Finding(name, "cannot be imported", level, f"{needed_for}: missing", remedy)


def _power(board: BoardState) -> Iterator[Finding]:
    if board.power_mode is not None:
        slow = bool(board.power_modes) and not board.power_mode.startswith("MAXN")
        yield Finding(
            "power mode",
            board.power_mode,
            "warning" if slow else "ok",
            "latency: the board is capped, and tactics are chosen for this mode during a build"
            if slow
            else "",
            f"sudo nvpmodel -m <id>, of {', '.join(board.power_modes)}" if slow else "",
        )
    if board.clocks_fixed is not None:
        yield Finding(
            "clocks",
            "fixed at their top" if board.clocks_fixed else "change with the load",
            "ok" if board.clocks_fixed else "warning",
            ""
            if board.clocks_fixed
            else "latency varies, and a build times tactics while they change",
            "" if board.clocks_fixed else "sudo jetson_clocks",
        )


def _memory(board: BoardState) -> Iterator[Finding]:
    if board.memory is not None and board.available is not None:
        yield Finding(
            "memory", f"{_gb(board.memory)}, {_gb(board.available)} available to a program"
        )
    swap = f"{_gb(board.disk_swap)} on a disk, {_gb(board.zram)} of ZRAM"
    if board.zram and not board.disk_swap:
        yield Finding(
            "swap",
            swap,
            "warning",
            "diffcr build may be killed: ZRAM takes the memory that it gives",
            "sudo systemctl disable --now nvzramconfig, then a swap file on NVMe: sudo fallocate -l 16G "
            "/swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile",
        )
    else:
        yield Finding("swap", swap)
    if board.desktop is not None:
        yield Finding(
            "desktop",
            f"runs ({board.desktop})",
            "warning",
            "diffcr build and loading: it takes memory that the GPU shares",
            "sudo systemctl isolate multi-user.target",
        )
    else:
        yield Finding("desktop", "does not run")


def _artifact(artifact: Path, board: BoardState) -> Iterator[Finding]:
    try:
        manifest = read_manifest(artifact)
        modes: list[EngineMode] = ["per_bucket"]
        modes += ["profiles"] if manifest.profile_graphs else []
        for mode in modes:
            plan = plan_engines(manifest, mode)
            need = memory_need(manifest, plan, read_activations(artifact))
            problems = verdicts(need, board.available, board.disk_swap)
            yield Finding(
                f"{artifact.resolve().name}, {mode}",
                f"{_gb(need.loaded)} loaded, {_gb(need.swapped)} with swap=True, {_gb(need.build)} while "
                "building (estimates)",
                "fails" if problems else "ok",
                " ".join(problems),
            )
    except DiffCRError as error:
        yield Finding(str(artifact), "cannot be read", "fails", error.message)
        return
    yield from _engines(artifact, manifest, board)


def _engines(artifact: Path, manifest: Manifest, board: BoardState) -> Iterator[Finding]:
    for path in sorted((artifact / ENGINES).glob(f"*/{SIDECAR}")):
        try:
            sidecar = read_sidecar(path.parent)
            check_plans(path.parent, sidecar, contents=False)
        except DiffCRError as error:
            yield Finding(path.parent.name, "damaged", "fails", error.message)
            continue
        device = sidecar.device
        other = []
        if board.sm is not None and device.sm != board.sm:
            other.append(f"SM{device.sm}, this board is SM{board.sm}")
        if board.tensorrt is not None:
            here = version_numbers(board.tensorrt)
            built = version_numbers(device.version)
            if here[: len(built)] != built[: len(here)]:
                other.append(f"TensorRT {device.version}, here is {board.tensorrt}")
        other += _other_module(device, board)
        why = [f"built for {' and '.join(other)}"] if other else []
        why += _unusable(path.parent, sidecar, manifest)
        yield Finding(
            path.parent.name,
            str(device),
            "fails" if why else "ok",
            f"load(backend='tensorrt'): {'; '.join(why)}" if why else "",
            f"diffcr build {artifact}" if why else "",
        )


def _unusable(folder: Path, sidecar: Sidecar, manifest: Manifest) -> Iterator[str]:
    """What a load would refuse on the very device, too."""
    if sidecar.made_from != made_from(manifest):
        yield "made from other graphs than the artifact has now"
    if sidecar.ahead_of_time:
        yield "built ahead of time, without the device"
    elif not is_checked(folder, sidecar):
        yield "not compared with the golden outputs yet"


def _other_module(device: Device, board: BoardState) -> Iterator[str]:
    """What makes a board another than the one of an engine, although it has the same kind of GPU."""
    if board.model is not None and device.board != board.model:
        yield f"the board {device.board or 'without a name'}, here is {board.model}"
    # a board that is known shares its memory with the GPU; elsewhere the system's says nothing about it
    if board.sm is not None and board.memory is not None:
        here = round(board.memory / 1e9)
        if not same_memory(device.memory_gb, here):
            yield f"{device.memory_gb} GB of memory, here are {here} GB"


def _version(name: str) -> str | None:
    try:
        module: Any = importlib.import_module("cuda.bindings" if name == "cuda" else name)
    except ImportError:
        return None
    return str(getattr(module, "__version__", "version unknown"))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 or size == 0 else f"{size / 1e6:.0f} MB"


def as_json(findings: list[Finding]) -> str:
    """For programs."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)
