"""What a board is and how it is set, read from its files: L4T, TensorRT, power, memory, desktop.

Standard library only: this file goes on the device. Everything is read below a root, so that a test can
hand it the files of any board.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

# First L4T -> JetPack, TensorRT of it. Read in NVIDIA's release notes and forum threads, see docs/jetson.md.
JETPACKS = (
    ((39, 2), "7.2", "10.16"),
    ((38, 4), "7.1", "10.13"),
    ((38, 0), "7.0", "10.13"),
    ((36, 4), "6.1 or 6.2", "10.3"),
    ((36, 0), "6.0", "8.6"),
    ((35, 0), "5", "8.5"),
)
# Which board this is, ended by a NUL; machines without a device tree have none.
BOARD_MODEL_FILE = "proc/device-tree/model"
_BOARDS = (("orin", 87), ("thor", 110), ("xavier", 72))
_DESKTOPS = frozenset({"Xorg", "Xwayland", "gnome-shell", "gdm3", "gdm-x-session", "lightdm"})
_PACKAGES = ("libnvinfer10", "libnvinfer11", "libnvinfer8", "libnvinfer-bin")


@dataclasses.dataclass(frozen=True)
class BoardState:
    """What was found; None or empty where it was not.

    Attributes:
        model: of the board, such as ``NVIDIA Jetson AGX Orin Developer Kit``.
        l4t: such as ``36.4.3``.
        jetpack: such as ``6.1 or 6.2``.
        tensorrt: version of the installed package, such as ``10.3.0.30``.
        trtexec: its path.
        sm: compute capability that the board's name tells.
        power_mode: name of nvpmodel's mode.
        power_modes: all of them.
        clocks_fixed: whether jetson_clocks holds the clocks at their top.
        memory: bytes in all.
        available: bytes that a program can get without swapping.
        disk_swap: bytes of swap on a disk or in a file.
        zram: bytes of swap in compressed memory.
        desktop: a process of a desktop that runs.
    """

    model: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    tensorrt: str | None = None
    trtexec: str | None = None
    sm: int | None = None
    power_mode: str | None = None
    power_modes: tuple[str, ...] = ()
    clocks_fixed: bool | None = None
    memory: int | None = None
    available: int | None = None
    disk_swap: int = 0
    zram: int = 0
    desktop: str | None = None


def read_board(root: Path = Path("/")) -> BoardState:
    """The state of the board whose files lie below `root`."""
    model = board_model(root) or None
    l4t = _l4t(_text(root / "etc/nv_tegra_release"))
    modes, mode = _power(root)
    disk, zram = _swaps(_text(root / "proc/swaps"))
    memory = _meminfo(_text(root / "proc/meminfo"))
    return BoardState(
        model=model,
        l4t=l4t,
        jetpack=_jetpack(l4t),
        tensorrt=_package(_text(root / "var/lib/dpkg/status")),
        trtexec=_trtexec(root),
        sm=next((sm for name, sm in _BOARDS if name in (model or "").lower()), None),
        power_mode=mode,
        power_modes=modes,
        clocks_fixed=_clocks(root),
        memory=memory.get("MemTotal"),
        available=memory.get("MemAvailable"),
        disk_swap=disk,
        zram=zram,
        desktop=_desktop(root),
    )


def board_model(root: Path = Path("/")) -> str:
    """Name of the board, such as ``NVIDIA Jetson AGX Orin Developer Kit``; "" where none is written."""
    return _text(root / BOARD_MODEL_FILE).replace("\0", "").strip()


def version_numbers(version: str) -> tuple[int, ...]:
    """``10.3.0.30-1+cuda12.5`` -> (10, 3, 0, 30)."""
    return tuple(
        int(part) for part in re.split(r"[-+]", version)[0].split(".") if part.isdigit()
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _l4t(text: str) -> str | None:
    """``# R36 (release), REVISION: 4.3, ...`` -> ``36.4.3``."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else None


def _jetpack(l4t: str | None) -> str | None:
    if l4t is None:
        return None
    numbers = version_numbers(l4t)
    return next((name for first, name, _ in JETPACKS if numbers >= first), None)


def _package(status: str) -> str | None:
    """Version of TensorRT's library as dpkg has it."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE))
        installed = fields.get("Status", "").endswith(" installed")
        if fields.get("Package") in _PACKAGES and installed:
            return fields.get("Version")
    return None


def _trtexec(root: Path) -> str | None:
    for folder in ("usr/src/tensorrt/bin", "usr/bin", "usr/local/bin"):
        if (root / folder / "trtexec").is_file():
            return f"/{folder}/trtexec"
    return None


def _power(root: Path) -> tuple[tuple[str, ...], str | None]:
    """Names of nvpmodel's modes, and of the one that is set."""
    pairs = re.findall(
        r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf")
    )
    found = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    names = {int(number): name for number, name in pairs}
    mode = names.get(int(found.group(1)), f"mode {int(found.group(1))}") if found else None
    return tuple(names.values()), mode


def _clocks(root: Path) -> bool | None:
    """Whether lowest and highest clock are the same, of the GPU or else of the first core."""
    folders = [
        p
        for p in sorted((root / "sys/class/devfreq").glob("*"))
        if "gpu" in p.name or "gv11b" in p.name
    ]
    pairs = [(p / "min_freq", p / "max_freq") for p in folders]
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    pairs.append((cpu / "scaling_min_freq", cpu / "scaling_max_freq"))
    for low, high in pairs:
        if low.is_file() and high.is_file():
            return _text(low).strip() == _text(high).strip()
    return None


def _meminfo(text: str) -> dict[str, int]:
    rows = re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    return {name: 1024 * int(size) for name, size in rows}


def _swaps(text: str) -> tuple[int, int]:
    """Bytes of swap on disks, and in compressed memory."""
    disk = zram = 0
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 3 or not fields[2].isdigit():
            continue
        if "zram" in fields[0]:
            zram += 1024 * int(fields[2])
        else:
            disk += 1024 * int(fields[2])
    return disk, zram


def _desktop(root: Path) -> str | None:
    for path in sorted((root / "proc").glob("[0-9]*/comm")):
        name = _text(path).strip()
        if name in _DESKTOPS:
            return name
    return None
