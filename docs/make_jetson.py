"""Write docs/jetson.md from docs/jetson.in.txt and the estimate of memory; `make docs` checks that it is up to date.

python docs/make_jetson.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "jetson.md"
SOURCE = ROOT / "docs" / "jetson.in.txt"
# parameters of a model, bytes of each, timestep buckets
CASES = ((33, 2, 4), (131, 2, 4), (676, 2, 4), (676, 4, 4), (2000, 2, 4), (12000, 2, 4))
BOARDS = ("jetson-orin-nano@jp6.2", "jetson-agx-orin@jp7.2", "jetson-thor@jp7.2")


def page() -> str:
    """The whole page."""
    text = SOURCE.read_text(encoding="utf-8")
    table = "\n".join(_memory())
    jetpacks = "\n".join(_jetpacks())
    return text.replace("@MEMORY@", table).replace("@JETPACKS@", jetpacks)


def out_of_date() -> list[str]:
    """A finding if the page is not what the code says."""
    found = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return (
        [] if found == page() else ["docs/jetson.md is out of date: run docs/make_jetson.py"]
    )


def _memory() -> Iterator[str]:
    from diffcr_compile.export.device.memory import (
        BUILD_FACTOR,
        FIXED_ACTIVATION,
        MemoryNeed,
    )
    from diffcr_compile.planning.targets import find_target

    boards = [find_target(name) for name in BOARDS]
    heads = " | ".join(
        f"{b.device.split(',')[0]} ({_gb(b.memory_bytes or 0)})" for b in boards
    )
    yield f"| parameters, type | `per_bucket`, all loaded | `profiles`, or `swap=True` | build | {heads} |"
    yield "|---|---|---|---|" + "---|" * len(boards)
    for millions, size, buckets in CASES:
        weights = millions * 1_000_000 * size
        need = MemoryNeed(
            weights=weights,
            copies=buckets,
            activations=FIXED_ACTIVATION,
            tensors=0,
            build=round(BUILD_FACTOR * weights) + FIXED_ACTIVATION,
        )
        fits = " | ".join(_fits(need, board.memory_bytes or 0) for board in boards)
        kind = {2: "fp16", 4: "fp32"}[size]
        figures = " | ".join(_gb(n) for n in (need.loaded, need.swapped, need.build))
        yield f"| {millions} M, {kind} | {figures} | {fits} |"


def _fits(need: object, memory: int) -> str:
    """What fits in three quarters of a module: the system and CUDA take some."""
    from diffcr_compile.export.device.memory import MemoryNeed

    assert isinstance(need, MemoryNeed)
    usable = 3 * memory // 4
    if need.loaded <= usable and need.build <= usable:
        return "all"
    if need.swapped > usable:
        return "no"
    parts = ["all" if need.loaded <= usable else "one engine at a time"]
    if need.build > usable:
        parts.append("build with swap on a disk")
    return ", ".join(parts)


def _jetpacks() -> Iterator[str]:
    from diffcr_compile.device_doctor import OLDEST_TENSORRT
    from diffcr_compile.device_state import JETPACKS

    yield "| JetPack | L4T from | TensorRT | |"
    yield "|---|---|---|---|"
    for first, name, tensorrt in JETPACKS:
        version = tuple(int(part) for part in tensorrt.split("."))
        remark = "too old: no strong typing" if version < OLDEST_TENSORRT else ""
        if version == OLDEST_TENSORRT:
            remark = "works; wrong results with open lengths are known: `--mode per_bucket`"
        yield f"| {name} | {'.'.join(map(str, first))} | {tensorrt} | {remark} |"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
