"""One runner, many threads, mixed timestep buckets: outputs must be those of one thread, memory must not grow.

python -m benchmarks.reliability.load --calls 10000 --threads 8 --out results.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from diffcr_compile.runtime import load

DIFFERENT_CALLS = 32


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
    )
    return int(line.split()[1]) * 1024


def different_calls(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls of other numbers each, in all timestep buckets in turn."""
    generator = np.random.default_rng(0)
    calls = []
    for number in range(DIFFERENT_CALLS):
        call = {
            name: generator.standard_normal(a.shape).astype(a.dtype)
            if a.dtype.kind == "f"
            else a
            for name, a in inputs.items()
        }
        call["timestep"] = np.full_like(inputs["timestep"], 1000 - 31 * number)
        calls.append(call)
    return calls


def run(artifact: Path, inputs: dict[str, Any], calls: int, threads: int) -> dict[str, Any]:
    """`calls` calls from `threads` threads on one runner."""
    runner = load(artifact, threads=1)
    different = different_calls(inputs)
    expected = [runner(**call) for call in different]

    def share(first: int, count: int) -> int:
        """Wrong outputs among every `threads`-th call; a future per call would be growth itself."""
        wrong = 0
        for number in range(first, count, threads):
            which = (number * 7) % DIFFERENT_CALLS
            wrong += not np.array_equal(runner(**different[which]), expected[which])
        return wrong

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        numbers = range(threads)
        # pools and arenas fill up first
        wrong = sum(pool.map(share, numbers, [max(200, calls // 5)] * threads))
        before = resident_bytes()
        wrong += sum(pool.map(share, numbers, [calls] * threads))
        after = resident_bytes()
    return {
        "calls": calls, "threads": threads, "buckets": len(runner.manifest.buckets),
        "wrong_outputs": wrong,
        "memory_growth": round(after / before - 1, 4), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def main() -> None:
    from benchmarks.reliability.cases import tiny_artifact

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact, inputs = tiny_artifact(Path(folder) / "artifact")
        result = run(artifact, inputs, arguments.calls, arguments.threads)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
