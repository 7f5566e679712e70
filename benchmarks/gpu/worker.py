"""The process of one family of engines: takes cases on its standard input, writes an answer file each.

A crash of an executor ends this process and no other; the parent notes it and goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import measure, ort_engine, torch_engines, trt_engine
from benchmarks.gpu.cases import TRT, Case
from benchmarks.gpu.engines import Engine, UnavailableError
from benchmarks.gpu.half_onnx import write_half
from benchmarks.gpu.models import Routed, frozen, make_routed
from benchmarks.gpu.parity import CPU_SIZE, References, parity_rows, references, to_arrays
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.errors import one_line

# Below this share of free memory, models of earlier cases are dropped.
SCARCE = 0.4


class Worker:
    """Measures cases one after the other; models stay for the next case."""

    def __init__(self, device: str, folder: Path, seconds: float) -> None:
        self._device, self._folder, self._seconds = device, folder, seconds
        self._routed: dict[tuple[int, int], Routed] = {}
        self._shares: dict[tuple[int, int, float], float] = {}

    def answer(self, case: Case) -> dict[str, Any]:
        """What the record says of a case; no exception of an executor gets out."""
        started = time.perf_counter()
        try:
            found = self._measured(case)
        except UnavailableError as error:
            found = {"status": "unavailable", "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - executors raise anything; it goes into the record
            traceback.print_exc()
            found = {"status": "error", "reason": one_line(error, 1500)}
        return {**found, "seconds": round(time.perf_counter() - started, 2)}

    def _measured(self, case: Case) -> dict[str, Any]:
        if case.engine in TRT:
            trt_engine.check(case.engine)  # before a model is made for nothing
        torch_engines.forget_compiled()
        started = time.perf_counter()
        routed = self._model(case)
        path = self._folder / "references" / f"{case.model_key}-k{case.keep_ratio:g}.npz"
        is_small = case.tokens * case.width <= CPU_SIZE
        of = references(routed, case.keep_ratio, path, on_cpu_too=is_small)
        made = time.perf_counter()
        engines, memory = {}, {}
        for name, ratio in ((measure.DENSE, 1.0), (measure.COMPRESSED, case.keep_ratio)):
            watch = measure.MemoryWatch()
            engines[name] = self._engine(case, routed, ratio)
            engines[name].run()  # compiles and allocates
            memory[name] = watch.of(engines[name].run)
        ready = time.perf_counter()
        runs = {name: engine.run for name, engine in engines.items()}
        latency = measure.latency(runs, self._seconds)
        share = self._macs_share(case, routed)
        return {
            **self._parity(engines, of),
            "latency": latency,
            "macs_share": share,
            "macs_imply": 1 / share,
            "realised_over_implied": latency["speed_up"] * share,
            "memory": memory,
            "model_seconds": round(made - started, 2),
            "engine_seconds": round(ready - made, 2),
            "remarks": list(dict.fromkeys(r for e in engines.values() for r in e.remarks)),
        }

    def _model(self, case: Case) -> Routed:
        """The model of a case, from an earlier one if it is still there."""
        key = case.tokens, case.width
        if key not in self._routed:
            if self._device == "cuda" and _free_share() < SCARCE:
                self._routed.clear()
                torch.cuda.empty_cache()
            self._routed[key] = make_routed(*key, self._device)
        return self._routed[key].for_batch(case.batch)

    def _macs_share(self, case: Case, routed: Routed) -> float:
        key = case.tokens, case.width, case.keep_ratio
        if key not in self._shares:
            self._shares[key] = routed.macs_share(case.keep_ratio)
        return self._shares[key]

    def _engine(self, case: Case, routed: Routed, ratio: float) -> Engine:
        if case.family == "torch":
            module = routed.dense if ratio == 1.0 else frozen(routed.half, ratio).module
            return torch_engines.make(case.engine, module, routed.call)
        name = f"{case.model_key}-k{ratio:g}.onnx".replace("/", "-")
        path = write_half(frozen(routed.wide, ratio), self._folder / "onnx" / name)
        inputs = dict(routed.wide.example)
        if case.engine in TRT:
            return trt_engine.make(case.engine, path, inputs)
        return ort_engine.make(path, inputs)

    def _parity(self, engines: dict[str, Engine], of: References) -> dict[str, Any]:
        """Status and how far the answers are from the references."""
        found = {}
        for name, engine in engines.items():
            engine.run()
            measure.synchronize()
            found[name] = to_arrays(engine.outputs())
        rows = parity_rows(found[measure.DENSE], found[measure.COMPRESSED], of)
        passed = all(row["passed"] for row in rows)
        return {"status": "ok" if passed else "mismatch", "parity": rows}


def _free_share() -> float:
    free, total = torch.cuda.mem_get_info()
    return free / total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    # float32 is what answers are held to: convolutions would else be rounded to TF32
    torch.backends.cudnn.allow_tf32 = False
    worker = Worker(arguments.device, arguments.folder, arguments.seconds)
    for line in sys.stdin:
        asked = json.loads(line)
        write_json_atomic(Path(asked["answer"]), worker.answer(Case(**asked["case"])))


if __name__ == "__main__":
    main()
