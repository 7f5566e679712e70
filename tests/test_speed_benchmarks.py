"""The benchmarks of speed and size, each in its shortest form: that they run, not what they find."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    artifact_size,
    cost_model,
    export_cost,
    load_memory,
    peers,
    routing_gap,
    speedup,
)
from benchmarks.speed.record import write_record
from benchmarks.speed.routing_parts import block_overhead, break_even
from diffcr_compile.export import artifact, bucket_graphs
from diffcr_compile.export.checks import Checks

ROOT = Path(__file__).resolve().parent.parent


def make_speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_speed", ROOT / "docs/make_speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(name: str, found: dict[str, Any], folder: Path) -> str:
    """What the page says about a record."""
    path = folder / f"{name}.json"
    write_record(path, found)
    record = json.loads(path.read_text())
    assert record["environment"]["torch"]
    assert record["machine"]["cores"] > 0
    return "\n".join(make_speed().SECTIONS[name](record))


def test_speedup(tmp_path: Path) -> None:
    rows = speedup.measure_size((64, 64, 1), 7, 0.5, (0.5,))
    assert {row["backend"] for row in rows} == {"onnxruntime", "torch"}
    for row in rows:
        assert row["realised_over_implied"] == pytest.approx(
            row["realised"] / row["macs_implied"]
        )
    assert "| onnxruntime | 64 | 64 | 1 |" in section("speedup", {"rows": rows}, tmp_path)


def test_peers(tmp_path: Path) -> None:
    case = peers.measure(peers.Size(64, 2, 64), 7)
    assert len(case["rows"]) == 7
    assert "token merging, torch" in section("peers", {"cases": [case]}, tmp_path)


def test_routing_overhead(tmp_path: Path) -> None:
    row = block_overhead(64, 64, 7, (0.95, 0.5))
    assert 0 < row["routing_in_place"]["share"] < 1
    assert "| 64 | 64 |" in section("routing_overhead", {"blocks": [row]}, tmp_path)


def test_routing_gap(tmp_path: Path) -> None:
    row = routing_gap.measure((64, 64, 2), 3)
    assert set(row["routing_per_block"]) >= {"Gemm", "TopK", "Gather", "ScatterND"}
    assert min(row["routing_per_block"].values()) > 0
    total = row["blocks"] * sum(row["routing_per_block"].values()) + row["outside_of_routing"]
    assert total == pytest.approx(row["routed"] - row["fewer_tokens"])
    assert "| 64 | 64 | 2 |" in section("routing_gap", {"rows": [row]}, tmp_path)


def test_break_even_is_interpolated() -> None:
    assert break_even({"0.98": 1.01, "0.9": 0.97}) == pytest.approx(0.96)
    assert break_even({"0.98": 0.99, "0.9": 0.97}) == 0.98
    assert break_even({"0.9": 1.2}) == 0


def test_cost_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # seven rounds of microseconds are no table that a budget may be solved over
    monkeypatch.setattr("diffcr_compile.latency_table._check_table", lambda *_: None)
    case = cost_model.measure(64, 2, 64, 7, 0, 2)
    assert {row["schedule"] for row in case["rows"]} == {"uniform", "late blocks least"}
    assert "late blocks least" in section("cost_model", {"cases": [case]}, tmp_path)


def test_export_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, names in (
        (artifact, ("export_graph", "_write_golden")),
        (bucket_graphs, ("at_kept_tokens",)),
        (Checks, ("bucket", "shared")),
    ):
        for name in names:
            monkeypatch.setattr(place, name, getattr(place, name))  # put back afterwards
    (mapped,) = export_cost.SMOKE["mapped"]
    case = export_cost.measure(mapped, tmp_path)
    assert len(case["export"]["graphs"]["exported"]) == 1
    assert case["derived"] == case["graphs"] == 2
    assert case["worst_difference"] <= 1e-4
    cases = {"mapped": [case]}
    found = {"cases": cases, "summary": export_cost.summary(cases)}
    assert "mapped from a safetensors file" in section("export_cost", found, tmp_path)


def test_size_and_memory(tmp_path: Path) -> None:
    load_memory.make(tmp_path, 64, 2, 2, 64)
    assert artifact_size.bytes_below(tmp_path / "out/onnx") > 0
    for way in ("dense", "artifact"):
        assert set(load_memory.loaded(tmp_path, 2, way)) == {"way", "resident", "proportional"}
    assert np.load(tmp_path / "inputs.npz")["timestep"].shape == (1,)


def test_a_straight_line_is_found() -> None:
    line = export_cost.fit(np.array([1.0, 2, 3]), np.array([5.0, 7, 9]))
    assert line["seconds_per_block"] == pytest.approx(2)
    assert line["r2"] == pytest.approx(1)
