"""Dense against compressed on this machine's GPU, in every executor that is there.

    python -m benchmarks.gpu                        # everything; an hour
    python -m benchmarks.gpu --time-limit 150       # the most telling cases first, what fits
    python -m benchmarks.gpu --only eager,ort       # some executors: eager, cuda_graph, compile,
                                                    # compile_cuda_graph, ort, tensorrt, tensorrt_rtx, torch, trt
    python -m benchmarks.gpu --smoke --out x.json   # tiny models, also on a CPU; half a minute

Writes ``benchmarks/results/gpu_<device>.json`` after every case. Latency of a call is from the call until the
device is done, float16, dense and compressed in turns in one process until the median of their ratio is known
to 1 %; answers are held to float32 in eager mode on the GPU and on the CPU. A second run goes on where the
first one ended. Exit code 1 if an executor gave wrong answers; one that is missing or crashes is noted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import TRT, Case, all_cases, chosen_engines
from benchmarks.gpu.facts import device_facts, slug, versions
from benchmarks.gpu.record import Record, settings
from benchmarks.gpu.workers import Workers

RESULTS = Path(__file__).resolve().parents[1] / "results"
SECONDS, SMOKE_SECONDS = 2.5, 0.5
# Of a single case; far more than any should take.
MOST_CASE_SECONDS = 900.0
# A case that is under way when the time is up may finish within this.
GRACE_SECONDS = 15.0


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS")
    parser.add_argument("--only", metavar="ENGINES", help="comma-separated")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument(
        "--again", action="store_true", help="also what is in the file already"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models; a CPU will do")
    found = parser.parse_args(arguments)
    try:
        found.engines = chosen_engines(found.only)
    except ValueError as error:
        parser.error(str(error))
    if not found.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke tries the suite on a CPU")
    return found


def run_cases(
    record: Record, cases: list[Case], workers: Workers, limit: float | None
) -> None:
    """Run cases in order until the time is up; what an executor took last is what it may take again."""
    started, took = time.monotonic(), dict[str, float]()
    missing = not_installed(cases)
    left_out = []
    for case in cases:
        left = MOST_CASE_SECONDS
        if limit is not None:
            left = limit - (time.monotonic() - started)
        if case.engine in missing:
            record.add(case, {"status": "unavailable", "reason": missing[case.engine]})
            continue
        if left < took.get(case.engine, 0.0) or left <= 0:
            left_out.append(case)
            continue
        answer = workers.run(case, min(left + GRACE_SECONDS, MOST_CASE_SECONDS))
        if answer["status"] == "late" and limit is not None:
            left_out.append(case)
            continue
        if answer["status"] == "unavailable":
            missing[case.engine] = answer["reason"]
        took[case.engine] = answer.get("seconds", 0.0)
        record.add(case, answer)
        print(line(case, answer), flush=True)
    record.leave_out(left_out)


def not_installed(cases: list[Case]) -> dict[str, str]:
    """Engines whose package is not there -> in words; no process is started for them."""
    packages = {"ort": "onnxruntime", **{name: name for name in TRT}}
    engines = dict.fromkeys(case.engine for case in cases)
    return {
        engine: f"no module named {packages[engine]}"
        for engine in engines
        if engine in packages and importlib.util.find_spec(packages[engine]) is None
    }


def line(case: Case, answer: dict[str, Any]) -> str:
    """A case for the reader."""
    if "latency" not in answer:
        return f"{case.key:40} {answer['status']}: {answer['reason'][:200]}"
    found = answer["latency"]
    middle = [found[name]["p50_ms"] for name in ("dense", "compressed")]
    stable = "" if found["stable"] else f", unstable ±{100 * found['relative_error']:.1f} %"
    return (
        f"{case.key:40} {answer['status']}: {middle[0]:.3f} -> {middle[1]:.3f} ms, {found['speed_up']:.3f} x, "
        f"MACs imply {answer['macs_imply']:.3f} x, {answer['seconds']:.0f} s{stable}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; the exit code."""
    chosen = parsed(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = device_facts(device)
    seconds = SMOKE_SECONDS if chosen.smoke else SECONDS
    out = chosen.out or _default_out(facts["name"], chosen.smoke)
    record = Record(out, facts, versions(), settings(seconds))
    cases = all_cases(chosen.engines, smoke=chosen.smoke)
    cases = [case for case in cases if chosen.again or not record.has(case)]
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(device, Path(folder), seconds)
        try:
            missing = not_installed(cases)
            for family in dict.fromkeys(c.family for c in cases if c.engine not in missing):
                workers.start(family)  # all at once: loading libraries takes seconds
            run_cases(record, cases, workers, chosen.time_limit)
        finally:
            workers.close()
    print(f"wrote {out}")
    if record.left_out:
        print(f"no time for {len(record.left_out)} cases: {', '.join(record.left_out)}")
    wrong = record.mismatches()
    if wrong:
        print(f"wrong answers: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _default_out(name: str, smoke: bool) -> Path:
    if smoke:
        return Path(tempfile.gettempdir()) / f"gpu_smoke_{slug(name)}.json"
    return RESULTS / f"gpu_{slug(name)}.json"


if __name__ == "__main__":
    sys.exit(main())
