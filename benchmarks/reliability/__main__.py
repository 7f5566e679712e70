"""Run the hard tests in full and write their figures: results/reliability.json and docs/reliability.md.

python -m benchmarks.reliability                            # half an hour on one core
python -m benchmarks.reliability --kills-from a.json b.json # kills that ran before, in processes of their own
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability import cases, corruption, kills, load, modules
from diffcr_compile.summary import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/reliability.json"
PAGE = ROOT / "docs/reliability.md"


def page(found: dict[str, Any]) -> str:
    """The document."""
    killed, damaged, called = found["kills"], found["corruption"], found["load"]
    drawn = found["modules"]
    codes = ", ".join(f"{code} {count}" for code, count in damaged["codes"].items())
    return f"""# Reliability

What was tried, and what came out. Made by `python -m benchmarks.reliability` on {found["date"]}
([reliability.json](../benchmarks/results/reliability.json)); change the script, not this page. `make test` runs a short form of
each, `make soak` the full one.

| tried | count | wrong |
|---|---|---|
| SIGKILL while a model is compiled, then the same call again | {killed["kills"]} kills at {killed["points"]} points | {len(killed["wrong"])} |
| corrupted artifacts | {damaged["corruptions"]} | {len(damaged["wrong"])} |
| calls of one runner from {called["threads"]} threads, mixed timestep buckets | {called["calls"] * called["threads"]} | {called["wrong_outputs"]} |
| random models through every stage, routed and refused blocks mixed | {drawn["models"]} | {len(drawn["wrong"])} |

## Kills

A process kills itself just before it opens a file of the artifact for writing, renames or deletes one, makes a folder, or
goes on to the next step ({killed["events_of_a_run"]} such events in a run); other kills fall at random moments. After {killed["not_loadable_after_the_kill"]}
of them the folder did not load; after the others the artifact was whole already. The same call again ended with the
same sha256 of every file and the same schedule as an undisturbed run. So equal inputs, seed and versions give
equal bytes; `created` in the manifest is the one exception.

## Corruption

Every file missing, empty, cut at five places, longer, swapped with another, a folder, or a link out of the artifact; every key of the
manifest missing or of another type; paths out of the folder; ONNX files with other domains, functions, sparse or
misplaced weights and huge shapes under hashes that fit; and flipped bits at random places. Refused with: {codes}. Peak memory was
{damaged["memory_peak_over_normal"]} of what loading a whole artifact takes. The same happens with every load, before ONNX Runtime sees a file.

What this does not promise: hashes and checksum tell damage and carelessness, not a person who may rewrite the whole
artifact. Such a person cannot make the runtime read other files or load operators of their own, but can change what a graph
computes. Sign the folder where that matters.

## Load

Outputs of all threads were those of one thread, bit for bit; resident memory grew by {called["memory_growth"]:.2%} after a warm-up.

## Random models

{drawn["blocks"]["legal"]} blocks that treat tokens alike and {drawn["blocks"]["illegal"]} that do not, in {drawn["models"]} models with arguments in either
order, masks, tables, tuples and two layouts. Every block of the first kind was routed, every one of the second refused with
a reason; routed models equalled the dense one bit for bit with all tokens kept, a slow reference on half of them within
1e-4, and ONNX Runtime agreed within 1e-4.

## Not tried yet

Full disks and read-only folders at every stage, long calibrations, hashes of the packages that CI installs.
"""


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one: counts are added, findings put together."""
    result: dict[str, Any] = {}
    for name, value in runs[0].items():
        every = [run[name] for run in runs]
        if name in {"seed", "first_seed", "events_of_a_run"}:
            result[name] = value
        elif isinstance(value, dict):
            keys = dict.fromkeys(key for item in every for key in item)
            result[name] = {key: sum(item.get(key, 0) for item in every) for key in keys}
        elif isinstance(value, list):
            result[name] = [line for item in every for line in item]
        else:
            result[name] = sum(every)
    return result


def read(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=250)
    parser.add_argument("--kills-from", type=Path, nargs="*", default=[])
    parser.add_argument("--modules", type=int, default=500)
    parser.add_argument("--modules-from", type=Path, nargs="*", default=[])
    parser.add_argument("--corruptions", type=int, default=2500)
    parser.add_argument("--calls", type=int, default=10_000)
    arguments = parser.parse_args()
    # Forks first: ONNX Runtime's threads do not live on in a fork.
    killed = read(arguments.kills_from) or [kills.run(arguments.points)]
    drawn = read(arguments.modules_from) or [modules.run(arguments.modules)]
    found: dict[str, Any] = {"kills": merged(killed), "modules": merged(drawn)}
    with tempfile.TemporaryDirectory() as folder:
        artifact, inputs = cases.tiny_artifact(Path(folder) / "artifact")
        found["corruption"] = corruption.run(artifact, inputs, arguments.corruptions)
        found["load"] = load.run(artifact, inputs, arguments.calls, threads=8)
    found |= {"environment": environment(), "date": time.strftime("%Y-%m-%d")}
    RESULTS.write_text(json.dumps(found, indent=1, default=str) + "\n")
    PAGE.write_text(page(found), encoding="utf-8")
    print(
        {
            name: len(found[name].get("wrong", []))
            for name in ("kills", "corruption", "modules")
        }
    )


if __name__ == "__main__":
    main()
