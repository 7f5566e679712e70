"""The GPU suite, tried on the CPU: the record's structure, wrong answers, crashes, limits of time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import measure, torch_engines, worker
from benchmarks.gpu.cases import ENGINES, Case, all_cases, chosen_engines
from benchmarks.gpu.engines import Engine
from benchmarks.gpu.facts import slug
from benchmarks.gpu.models import frozen, make_routed, on_cpu
from benchmarks.gpu.record import Record, settings
from benchmarks.gpu.workers import Workers
from diffcr_compile.program import run_flat

CASE = Case("eager", 64, 32, 2, 0.5)


class Answers:
    """In the place of the processes: gives what it is told, in turns."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def run(self, case: Case, most_seconds: float) -> dict[str, Any]:
        self.asked.append(case.key)
        return self.answers.pop(0)


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> worker.Worker:
    """One for several tests: it keeps its model."""
    return worker.Worker("cpu", tmp_path_factory.mktemp("worker"), 0.1)


def record_in(path: Path) -> Record:
    return Record(path, {"name": "cpu"}, {"torch": "1"}, settings(1.0))


def test_the_smoke_run_measures_and_notes_what_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    assert suite.main(["--smoke", "--out", str(out), "--only", "eager,cuda_graph,ort"]) == 0
    data = json.loads(out.read_text())
    cases = {case["engine"]: case for case in data["cases"].values()}
    for name in ("eager", "ort"):
        found = cases[name]
        assert found["status"] == "ok", found
        assert len(found["parity"]) == 4
        assert all(
            row["passed"] and row["rel_l2"] <= row["tolerance"] for row in found["parity"]
        )
        for one in (found["latency"]["dense"], found["latency"]["compressed"]):
            assert 0 < one["p50_ms"] <= one["p90_ms"]
            assert one["samples"] == found["latency"]["rounds"] >= 3
        assert 0.4 < found["macs_share"] < 0.6
        expected = found["latency"]["speed_up"] * found["macs_share"]
        assert found["realised_over_implied"] == pytest.approx(expected)
    if not torch.cuda.is_available():
        assert data["device"]["kind"] == "cpu"
        assert cases["cuda_graph"]["status"] == "unavailable"
    assert data["left_out"] == []
    assert data["versions"]["torch"] == torch.__version__


def test_a_wrong_answer_is_a_mismatch_and_fails_the_run(
    working: worker.Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch_engines.make

    def planted(name: str, module: Any, call: Any) -> Engine:
        engine = right(name, module, call)
        if hasattr(module, "program"):  # the compressed one
            return dataclasses.replace(
                engine, outputs=lambda: [1.02 * t for t in engine.outputs()]
            )
        return engine

    monkeypatch.setattr(torch_engines, "make", planted)
    answer = working.answer(CASE)
    assert answer["status"] == "mismatch"
    failed = [row["step"] for row in answer["parity"] if not row["passed"]]
    assert failed == [
        "compressed -> float32, eager, device",
        "compressed -> float32, eager, CPU",
    ]
    record = record_in(tmp_path / "record.json")
    record.add(CASE, answer)
    assert record.mismatches() == [CASE.key]
    monkeypatch.setattr(suite, "versions", lambda: {"torch": "1"})
    monkeypatch.setattr(suite, "run_cases", lambda *_: None)
    assert suite.main(["--smoke", "--only", "eager", "--out", str(record.path)]) == 1


def test_a_large_model_is_held_to_the_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CPU_SIZE", 64 * 32 - 1)
    answer = worker.Worker("cpu", tmp_path, 0.1).answer(CASE)
    assert answer["status"] == "ok"
    assert [row["step"] for row in answer["parity"]] == [
        "dense -> float32, eager, device",
        "compressed -> float32, eager, device",
    ]


def test_an_exception_of_an_executor_is_noted(
    working: worker.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Engine:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch_engines, "make", broken)
    answer = working.answer(CASE)
    assert answer["status"] == "error"
    assert "no kernel image is available" in answer["reason"]


def test_a_process_that_dies_is_noted_with_what_it_said(tmp_path: Path) -> None:
    workers = Workers("no such device", tmp_path, 0.1)
    try:
        answer = workers.run(dataclasses.replace(CASE, engine="eager"), 300)
        assert answer["status"] == "error"
        assert "no such device" in answer["reason"]
        process = workers._processes["torch"]  # it lives on: the exception was the case's
        process.kill()
        process.wait()
        answer = workers.run(CASE, 300)
        assert answer["status"] == "error"
        assert "ended with code -9" in answer["reason"]
    finally:
        workers.close()


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    cases = all_cases(("eager",), smoke=False)[:4]
    record = record_in(tmp_path / "record.json")
    answers = Answers({"status": "error", "reason": "x", "seconds": 50.0})
    suite.run_cases(record, cases, answers, 40.0)  # type: ignore[arg-type]
    assert answers.asked == [cases[0].key]  # another one may take 50 s too
    assert record.left_out == [case.key for case in cases[1:]]
    assert json.loads(record.path.read_text())["left_out"] == record.left_out


def test_a_record_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record_in(path).add(CASE, {"status": "ok"})
    assert record_in(path).has(CASE)
    assert not Record(path, {"name": "cpu"}, {"torch": "2"}, settings(1.0)).has(CASE)
    assert not Record(path, {"name": "cpu"}, {"torch": "1"}, settings(2.0)).has(CASE)
    assert Record(path, {"name": "other"}, {"torch": "1"}, settings(1.0)).cases == {}
    record_in(path).add(CASE, {"status": "error", "reason": "crash"})
    assert not record_in(path).has(CASE)


def test_cases_and_their_order() -> None:
    assert chosen_engines("trt,eager") == ("eager", "tensorrt", "tensorrt_rtx")
    with pytest.raises(ValueError, match="no engine cuda; there are eager"):
        chosen_engines("cuda")
    cases = all_cases(ENGINES, smoke=False)
    assert len({case.key for case in cases}) == len(cases) == 7 * 6 * 3 * 2
    assert cases[0] == Case("eager", 4096, 1152, 1, 0.5)
    sizes = {(case.tokens, case.width) for case in cases}
    assert sizes == {(n, c) for n in (256, 1024, 4096) for c in (384, 1152)}
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_timing_ends_when_the_ratio_is_known_or_the_time_is_up() -> None:
    calls = {"dense": 0, "compressed": 0}

    def run(name: str) -> None:
        calls[name] += 1

    runs = {name: lambda name=name: run(name) for name in calls}  # type: ignore[misc]
    found = measure.latency(runs, 0.05)
    assert (
        found["rounds"] == found["dense"]["samples"] == calls["dense"] - measure.WARM_UP_CALLS
    )
    assert calls["dense"] == calls["compressed"]


def test_a_program_is_copied_to_the_cpu_with_its_weights() -> None:
    program = frozen(make_routed(64, 32, "cpu").wide, 0.5)
    copied = on_cpu(program)
    with torch.no_grad():
        for one, two in zip(
            run_flat(copied, copied.example), run_flat(program, program.example), strict=True
        ):
            assert torch.equal(one, two)
    own = {p.data_ptr() for p in program.module.parameters()}
    assert not own & {
        p.data_ptr() for p in copied.module.parameters() if p.device.type != "cpu"
    }
