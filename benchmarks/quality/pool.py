"""Several runs side by side, a process each."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
import traceback
from collections.abc import Sequence

import torch

from benchmarks.quality.case import Case
from benchmarks.quality.jobs import run


def run_all(cases: Sequence[Case], processes: int, deadline: float) -> None:
    """Run those that are not done. The dense models come first, the others are compared with their images.

    Args:
        cases: in their order.
        processes: side by side.
        deadline: of ``time.monotonic``; no run is begun after it.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, _one_thread) as pool:
        for dense in (True, False):
            waiting = [c for c in cases if (c.job.variant == "dense") == dense and not c.done]
            futures = [pool.submit(_run, case, deadline) for case in waiting]
            for future in concurrent.futures.as_completed(futures):
                print(future.result(), flush=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


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
