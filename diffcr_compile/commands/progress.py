"""Progress of a long command: bars on a terminal, plain lines elsewhere, events in the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from diffcr_compile.commands.terminal import errors, terminal
from diffcr_compile.report.text import size

Event = Callable[[str, int, int, Mapping[str, Any]], None]
SECONDS_BETWEEN_LINES = 10


@contextlib.contextmanager
def progress() -> Iterator[Event]:
    """What ``diffcr_compile.compile`` takes as its `progress`.

    It goes to stderr; stdout is for results. With -q there is nothing to see.
    """
    if terminal.verbosity < 0:
        yield _logged(lambda *_: None)
    elif errors.is_terminal:
        with _bars() as update:
            yield _logged(update)
    else:
        yield _logged(_PlainLines())


def _logged(update: Event) -> Event:
    def both(stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
        terminal.event("progress", stage=stage, done=done, count=count, **figures)
        update(stage, done, count, figures)

    return both


@contextlib.contextmanager
def _bars() -> Iterator[Event]:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=count, figures="")
            bars.update(tasks[stage], completed=done, total=count, figures=_figures(figures))

        yield update


class _PlainLines:
    """Progress for logs: a line every ten seconds and at the end of each stage."""

    def __init__(self) -> None:
        self.last = 0.0
        self.started: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
        now = time.monotonic()
        began, first = self.started.setdefault(stage, (now, done))
        if now - self.last < SECONDS_BETWEEN_LINES and done < count:
            return
        self.last = now
        left = (now - began) / max(done - first, 1) * (count - done)
        errors.print(
            f"{stage} {done}/{count}  {_figures(figures)}  {left:.0f} s left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _figures(figures: Mapping[str, Any]) -> str:
    if "disk_bytes" in figures:
        return f"{size(figures['disk_bytes'])} on disk, up to {size(figures['memory_bytes'])} of memory"
    if "loss" not in figures:
        return ""
    return (
        f"loss {figures['loss']:.4f}  mean keep ratio {figures['mean_keep_ratio']:.3f}  "
        f"cost {figures['reached']:.1%} of {figures['budget']:.1%}"
    )
