"""Kills and disk faults, in a process of their own: forks want a process without threads.

python -m benchmarks.reliability.forked --kills 300 --faults 300 --out results.json
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability import faults, kills
from benchmarks.reliability.prepared import Prepared


def run(
    kill_count: int, fault_count: int, seed: int = 0, verbs: Sequence[str] = kills.VERBS
) -> dict[str, Any]:
    """Both, on the same undisturbed runs; what has a count of 0 is left out."""
    torch.set_num_threads(1)
    with Prepared() as prepared:
        runs = kills.Runs(prepared, verbs)
        gc.freeze()  # or every fork copies what its collector looks at
        found = {}
        if kill_count:
            found["kills"] = kills.run(runs, kill_count, seed, report)
        if fault_count:
            found["faults"] = faults.run(runs, fault_count, seed, report)
        return found


def report(line: str) -> None:
    """How far it is, at once."""
    print(line, flush=True)


def main() -> None:
    """Run them and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", nargs="+", choices=kills.VERBS, default=kills.VERBS)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    text = json.dumps(run(given.kills, given.faults, given.seed, given.verbs), indent=1)
    given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
