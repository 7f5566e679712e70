"""Timing: the ways to run a sampling loop, and which of them counts."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from diffcr_compile import bench


def way(dense: float, ratio: float, loops: int) -> dict[str, Any]:
    conditions = {"dense_seconds": [dense, dense * 3, dense], "loops": loops}
    return {"onnxruntime_cpu_loop": ratio, "conditions": conditions}


@pytest.mark.parametrize(("side_by_side", "expected"), [(3.0, 1.7), (5.0, 1.5)])
def test_the_way_counts_in_which_the_dense_model_is_fastest(
    monkeypatch: pytest.MonkeyPatch, side_by_side: float, expected: float
) -> None:
    """Two loops in 3 s are faster than one in 2 s, two in 5 s are not; the ratios do not matter."""

    def measured(*_: Any, threads: int, loops: int = 1) -> dict[str, Any]:
        assert (threads, loops) in ((2, 1), (1, 2))
        return way(2.0, 1.5, 1) if loops == 1 else way(side_by_side, 1.7, 2)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(bench, "sampling_loops", measured)
    found = bench.best_sampling_loops(Path("out"), [1.0])
    assert found["onnxruntime_cpu_loop"] == expected
    assert [w["onnxruntime_cpu_loop"] for w in found["settings"]] == [1.5, 1.7]


def test_one_core_has_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(bench, "sampling_loops", lambda *_, **__: way(2.0, 1.5, 1))
    assert len(bench.best_sampling_loops(Path("out"), [1.0])["settings"]) == 1


def test_loops_side_by_side_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other: one after the other they would wait for ever."""
    meeting = threading.Barrier(2, timeout=20)
    sessions: list[object] = []

    def session(*_: Any, **__: Any) -> Any:
        sessions.append(object())
        return type("Session", (), {"manifest": None})()

    monkeypatch.setattr(bench, "load", session)
    monkeypatch.setattr(bench, "DenseRunner", session)
    monkeypatch.setattr(bench, "example_arrays", lambda _: {})
    monkeypatch.setattr(bench, "batch_of", lambda _: 4)
    monkeypatch.setattr(bench, "_loop", lambda *_: meeting.wait())
    found = bench.sampling_loops(Path("out"), [1.0, 0.5], repeats=2, threads=1, loops=2)
    assert len(sessions) == 4  # a session of its own for each
    assert found["conditions"]["loops"] == 2
    assert len(found["conditions"]["pair_ratios"]) == 2
