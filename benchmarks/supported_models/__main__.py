"""Which diffusion transformers the compiler supports: every model of the zoo through every step.

    python -m benchmarks.supported_models                  # an hour on two CPU cores
    python -m benchmarks.supported_models --smoke          # three models, checks that it runs
    python -m benchmarks.supported_models --only Name      # anew; then --resume for the whole table
    python -m benchmarks.supported_models --partial        # also while files of the zoo are missing

Each model runs in a process of its own, at both of its sizes and with inputs of two seeds:
dense → captured → routed, all tokens kept → half of them kept, against a slow reference → permutation
of tokens → ONNX Runtime → TensorRT-RTX engine for SM86, built without a GPU. A failure is recorded with
its step and ends nothing else. A run over the whole zoo writes ``benchmarks/results/supported_models.json``
and ``docs/supported_models.md``; any other leaves both in the ``--work`` folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from benchmarks.supported_models.one_model import run_model
from benchmarks.supported_models.processes import environment, load_models, run_all
from benchmarks.supported_models.settings import DOCUMENT, RESULTS, ROOT
from benchmarks.supported_models.table import markdown, summarise


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supported_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of models")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--limit", type=int, default=900, help="processor seconds for one model"
    )
    parser.add_argument("--resume", action="store_true", help="keep finished entries")
    parser.add_argument("--smoke", action="store_true", help="three models")
    parser.add_argument("--skip-rtx", action="store_true", help="build no engines")
    parser.add_argument(
        "--partial", action="store_true", help="leave out files that are missing"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build/supported_models")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve() / ("smoke" if args.smoke else "")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse()
    if args.worker:
        # processor time: a machine that is busy or suspended must not look like a model that hangs
        resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 5))
        models, _ = load_models(partial=True)  # whoever started this has complained already
        run_model(models[args.worker], args.work / f"{args.worker}.json", args.skip_rtx)
        return
    models, problems = load_models(args.partial)
    for problem in problems:
        print(f"left out: {problem}")
    unknown = sorted(set(args.only) - set(models))
    if unknown:
        raise SystemExit(f"the zoo has no {unknown}; it has {sorted(models)}")
    chosen = args.only or (list(models)[:3] if args.smoke else list(models))
    entries = run_all({name: models[name] for name in chosen}, args)
    whole = not (args.only or args.smoke or problems)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(not args.skip_rtx),
        "summary": summarise([e for e in entries if e["kind"] != "handwritten"]),
        "handwritten": summarise([e for e in entries if e["kind"] == "handwritten"]),
        "models": entries,
    }
    results = RESULTS if whole else args.work / RESULTS.name
    document = DOCUMENT if whole else args.work / DOCUMENT.name
    results.write_text(json.dumps(report, indent=1) + "\n")
    document.write_text(markdown(report))
    print(json.dumps({key: report[key] for key in ("summary", "handwritten")}, indent=1))


if __name__ == "__main__":
    main()
