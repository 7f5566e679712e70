"""Several runs side by side, a process each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence

import torch

from benchmarks.quality.case import Case
from benchmarks.quality.jobs import run
from benchmarks.quality.narrow_products import emulated_products
from benchmarks.quality.states import make_states
from diffcr_compile.fast_bfloat16 import fast_bfloat16

# Kernels are registered for as long as their library is held.
_held: list[torch.library.Library] = []


def run_all(groups: Sequence[Sequence[Case]], processes: int, deadline: float) -> None:
    """Run those that are not done, group by group.

    The dense models come first, as the others are compared with their images. In a group what needs no states to
    be calibrated on comes first, so that there is something to do while they are made.

    Args:
        groups: cases in their order.
        processes: side by side.
        deadline: of ``time.monotonic``; no run is begun after it.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, _begin) as pool:
        waiting = [case for group in groups for case in group if not case.done]
        compared_with = {case.job.dense: case for case in waiting}
        dense = [dataclasses.replace(case, job=job) for job, case in compared_with.items()]
        needed = {(c.job.task, c.distils_steps): c for c in waiting if c.needs_states}
        futures = [pool.submit(_run, case, deadline) for case in dense]
        states = [pool.submit(make_states, case) for case in needed.values()]
        for group in groups:
            for needing in (False, True):
                chosen = [c for c in group if c in waiting and c.needs_states == needing]
                if needing:
                    concurrent.futures.wait(states)
                chosen = [case for case in chosen if case.job not in compared_with]
                futures += [pool.submit(_run, case, deadline) for case in chosen]
        for future in concurrent.futures.as_completed(futures):
            print(future.result(), flush=True)


def _begin() -> None:
    torch.set_num_threads(1)
    if not fast_bfloat16("cpu"):
        _held.append(emulated_products())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A comparison that is killed leaves no run behind that keeps a core busy for half an hour."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(case: Case, deadline: float) -> str:
    started = time.monotonic()
    if started > deadline:
        return f"{case.job.name}: not begun, the time is over"
    try:
        found = run(case)
    except Exception:  # noqa: BLE001 - one run is not all of them; it stays missing in the report
        return f"{case.job.name}: failed\n{traceback.format_exc()}"
    return (
        f"{time.strftime('%H:%M:%S')} {case.job.name}: KID x 1000 {found['kid_x1000']:.1f}, "
        f"MACs {found['macs']:.1%}, {found['steps_taken']} steps, {time.monotonic() - started:.0f} s"
    )
