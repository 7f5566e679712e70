"""Run the hard tests in full and write their figures: results/reliability.json and docs/reliability.md.

python -m benchmarks.reliability                              # hours on one core
python -m benchmarks.reliability --parts-from kills.json ...  # parts that ran before, in processes of their own
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability import (
    cases,
    corruption,
    determinism,
    forked,
    load,
    long_run,
    modules,
)
from benchmarks.reliability.page import page
from diffcr_compile.summary import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/reliability.json"
PAGE = ROOT / "docs/reliability.md"
# what describes a run and is not counted
DESCRIBES = {"seed", "first_seed", "points"}


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of one part as one: counts are added, findings put together."""
    result: dict[str, Any] = {}
    for name, value in runs[0].items():
        every = [run[name] for run in runs]
        if name in DESCRIBES or isinstance(value, (bool, str)):
            result[name] = value
        elif isinstance(value, dict):
            keys = dict.fromkeys(key for item in every for key in item)
            result[name] = {key: sum(item.get(key, 0) for item in every) for key in keys}
        elif isinstance(value, list):
            result[name] = [line for item in every for line in item]
        else:
            result[name] = sum(every)
    return result


def parts_from(paths: list[Path]) -> dict[str, Any]:
    """Parts that ran before: files of ``forked``, ``modules``, ``determinism`` and ``long_run``, told by their keys."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        data = json.loads(path.read_text())
        if "models" in data:
            data = {"modules": data}
        elif "processes" in data:
            data = {"determinism": data}
        elif "checkpoints" in data:
            data = {"long_run": data}
        for name, part in data.items():
            found.setdefault(name, []).append(part)
    return {n: merged(runs) if len(runs) > 1 else runs[0] for n, runs in found.items()}


def main() -> None:
    """Run what is not given, write both files, print how much was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--modules", type=int, default=500)
    parser.add_argument("--corruptions", type=int, default=2500)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--parts-from", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    found = parts_from(given.parts_from)
    # Forks first: ONNX Runtime's threads do not live on in a fork.
    kills = 0 if "kills" in found else given.kills
    faults = 0 if "faults" in found else given.faults
    found |= forked.run(kills, faults) if kills or faults else {}
    found["long_run"] = found.get("long_run") or long_run.run(given.steps)
    found["determinism"] = found.get("determinism") or determinism.everything()
    found["modules"] = found.get("modules") or modules.run(given.modules)
    with tempfile.TemporaryDirectory() as folder:
        artifact, inputs = cases.tiny_artifact(Path(folder) / "artifact")
        found["corruption"] = corruption.run(artifact, inputs, given.corruptions)
        found["load"] = load.run(artifact, inputs, given.calls, threads=8)
    found |= {"environment": environment(), "date": time.strftime("%Y-%m-%d")}
    RESULTS.write_text(json.dumps(found, indent=1, default=str) + "\n")
    PAGE.write_text(page(found), encoding="utf-8")
    print({name: len(part["wrong"]) for name, part in found.items() if "wrong" in part})


if __name__ == "__main__":
    main()
