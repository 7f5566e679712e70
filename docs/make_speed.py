"""Write docs/speed.md from the records in benchmarks/results; `make docs` checks that it is up to date.

python docs/make_speed.py
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]
GAP = ("Gemm", "TopK", "Gather", "ScatterND")  # of routing; what is left makes positions
HEAD = """# Speed and size

What the MACs promise, and what is delivered. Made by `docs/make_speed.py` from the records in
[benchmarks/results](../benchmarks/results); run a benchmark again, do not change this page. Models are untrained: speed and
size depend on shapes. Everything is a ratio of runs that took turns in one process; the machine is a shared one, so
milliseconds mean little. `python -m benchmarks.<name>` makes a record again, `--smoke` in seconds.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            lines += [*section(record), "", _origin(name, record), ""]
    return "\n".join(lines).rstrip() + "\n"


def out_of_date() -> list[str]:
    """One finding if the page is not what the records say."""
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return []
    return ["docs/speed.md is out of date; run python docs/make_speed.py"]


def speedup(record: Record) -> list[str]:
    """Realised over implied by size and backend."""
    lines = [
        "## Realised against MACs-implied speed-up",
        "",
        (
            "A DiT with the same keep ratio in every block, one thread. 1.0 is all that the MACs promise. Wanted: 1.0 on ONNX "
            "Runtime from 1,024 tokens on, 0.9 with 256; 0.9 in torch eager. **Bold** misses. *A quarter of the tokens* is the dense "
            "model on a smaller image, without any routing: what the machine makes of so few rows."
        )
        + _clocks(record["rows"]),
        "",
    ]
    ratios = sorted({row["keep_ratio"] for row in record["rows"]}, reverse=True)
    header = ["backend", "width", "tokens", "batch", "blocks"]
    header += [f"keep {ratio}" for ratio in ratios]
    table = []
    keys = sorted({tuple(row[k] for k in header[:5]) for row in record["rows"]})
    for key in keys:
        rows = {
            row["keep_ratio"]: row
            for row in record["rows"]
            if tuple(row[k] for k in header[:5]) == key
        }
        table.append([*map(str, key), *(_realised(rows[ratio]) for ratio in ratios)])
    return [*lines, *_table(header, table), "", _of_fewer_tokens(record["rows"])]


def _clocks(rows: Sequence[Record]) -> str:
    """What was measured; older rows are of elapsed time, which other programs on the machine disturb."""
    elapsed = len({(r["backend"], r["width"], r["tokens"], r["batch"]) for r in rows if "clock" not in r})  # fmt: skip
    older = f"; {elapsed} lines of the table are older, and of elapsed time" if elapsed else ""
    return f" Seconds are those of the processor{older}."


def _of_fewer_tokens(rows: Sequence[Record]) -> str:
    """How near a compressed model comes to the dense one on as few tokens, which routes nothing."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row.get("fewer_tokens"):
            shares.setdefault(row["backend"], []).append(row["realised"] / row["fewer_tokens"])
    found = [
        f"{statistics.median(of):.2f} in {backend} (median of {len(of)} sizes)"
        for backend, of in sorted(shares.items())
    ]
    return (
        "At a keep ratio of 0.25 the compressed model reaches, of the speed of the dense model on a quarter of the tokens, "
        f"{', '.join(found)}. What is missing there is the routing; the rest of a miss is what the executor makes of so few rows."
    )


def _realised(row: Record) -> str:
    backend, tokens = row["backend"], row["tokens"]
    wanted = {"onnxruntime": 1.0 if tokens >= 1024 else 0.9}.get(backend, 0.9)
    found = f"{row['realised_over_implied']:.2f}"
    found = found if float(found) >= wanted else f"**{found}**"
    bound = row.get("fewer_tokens")
    more = f", a quarter of the tokens {bound:.2f} ×" if bound else ""
    return f"{found} ({row['realised']:.2f} × of {row['macs_implied']:.2f} ×{more})"


def routing_overhead(record: Record) -> list[str]:
    """One block alone."""
    rows = [
        [
            str(row["width"]),
            str(row["tokens"]),
            f"{row['routing_in_place']['share']:.2%}",
            f"{row['routing_alone']:.2%}",
            f"{row['break_even_keep_ratio']:.3f}",
        ]
        for row in record["blocks"]
    ]
    header = [
        "width",
        "tokens",
        "routing in its graph",
        "routing alone",
        "pays from keep ratio",
    ]
    return [
        "## What routing costs",
        "",
        (
            "Router, top-k, gather and scatter at a keep ratio of 0.5, as a share of the dense block: where they stand, from "
            "the profiler, and in a graph of their own, which also pays for a call and for memory that is no longer in a cache; "
            "and the keep ratio from which on a routed block is faster than a dense one. Wanted at 1,024 tokens and width "
            "384 and more: at most 2 %, at least 0.95."
        ),
        "",
        *_table(header, rows),
    ]


def routing_gap(record: Record) -> list[str]:
    """Routed at a quarter of the tokens beside dense on as many."""
    rows = [
        [
            str(row["width"]),
            str(row["tokens"]),
            str(row["batch"]),
            *(f"{row['routing_per_block'].get(op, 0):.0f}" for op in GAP),
            f"{sum(spent for op, spent in row['routing_per_block'].items() if op not in GAP):.0f}",
            f"{row['blocks'] * sum(row['routing_per_block'].values()) / row['routed']:.1%}",
            f"{row['outside_of_routing'] / row['routed']:.1%}",
        ]
        for row in record["rows"]
    ]
    header = ["width", "tokens", "batch", "router", "TopK", "gather", "scatter", "positions", "all, of the run", "outside, of the run"]  # fmt: skip
    return [
        "## Where routing takes its time",
        "",
        (
            "At a keep ratio of 0.25, microseconds per block from ONNX Runtime's profiler, which adds some to each; as a share of "
            "the run; and what else the run takes more than the dense model on a quarter of the tokens: patch embedding and head see "
            "all tokens. ScatterND copies the stream in ONNX Runtime, whoever else reads it "
            "([0026](decisions/0026-rows-of-one-table.md))."
        ),
        "",
        *_table(header, rows),
    ]


def cost_model(record: Record) -> list[str]:
    """Predictions from the block table."""
    rows = [
        [
            f"{case['width']} wide, {case['tokens']} tokens",
            row["schedule"],
            f"{row['predicted_share']:.3f}",
            f"{row['measured_share']:.3f}",
            f"{row['off']:+.1%}",
        ]
        for case in record["cases"]
        for row in case["rows"]
    ]
    return [
        "## Latency predicted from the block table",
        "",
        "Shares of the dense model's time. Wanted: within 10 %.",
        "",
        *_table(["model", "schedule", "predicted", "measured", "off"], rows),
    ]


def peers(record: Record) -> list[str]:
    """Ours against others at equal MACs."""
    lines = ["## Against peers at equal MACs", ""]
    for case in record["cases"]:
        rows = [
            [
                row["name"],
                f"{row['speed_up_over_dense_onnx']:.2f} ×",
                f"{row['slower_than_ours']:.2f} ×",
            ]
            for row in case["rows"]
        ]
        header = ["way", "of dense in ONNX Runtime", "time, ours on the same executor = 1"]
        lines += [
            (
                f"Width {case['width']}, {case['blocks']} blocks, {case['tokens']} tokens, keep ratio {case['keep_ratio']} "
                f"({case['macs_share']:.1%} of the MACs):"
            ),
            "",
            *_table(header, rows),
            "",
        ]
    return lines[:-1]


def _as_a_user(record: Record) -> list[list[str]]:
    """Time that passes with all cores: torch's exporter runs on one, the runs of the model on all."""
    found = record["summary"].get("large_all_cores")
    if not found:
        return []
    threads = record["cases"]["large_all_cores"][0]["threads"]
    name = f"time of the export with all checks, of one plain export, {threads} cores"
    return [[name, "≤ 1.5 ×", f"{found['export_over_plain_elapsed']:.2f} ×"]]


def export_cost(record: Record) -> list[str]:
    """Export: time and memory."""
    found, lines = record["summary"], ["## Export", ""]
    rows = []
    for name, value in found.items():
        if name.startswith("further_bucket_of"):
            rows.append([f"graph of a further bucket of {name.rsplit('_', 1)[1]}, of the first's time", "≤ 5 %", f"{value:.1%}"])  # fmt: skip
    if "further_bucket_with_checks" in found:
        rows.append(["the same with golden outputs and all checks, which run the model", "", f"{found['further_bucket_with_checks']:.1%}"])  # fmt: skip
    if "large" in found:
        large = found["large"]
        rows += [
            ["28 blocks of width 1,152, 4 buckets: graph of a further bucket", "≤ 5 %", f"{large['further_bucket']:.1%}"],
            ["peak memory of the export, of the weights", "≤ 1.6 ×", f"{large['peak_over_weights']['export']:.2f} ×"],
            ["peak memory of capture and routing", "", f"{large['peak_over_weights']['capture_and_route']:.2f} ×"],
            ["peak memory of one plain export", "", f"{large['plain_peak_over_weights']:.2f} ×"],
            *_as_a_user(record),
            ["the same in processor time, with one thread", "", f"{large['export_over_plain']:.2f} ×"],
            ["of it the graphs", "", f"{large['graphs_over_plain']:.2f} ×"],
            ["of it 4 runs in torch, the golden outputs", "", f"{large['golden_over_plain']:.2f} ×"],
            ["of it 8 runs in ONNX Runtime, the checks", "", f"{large['checks_over_plain']:.2f} ×"],
        ]  # fmt: skip
    for stage, line in found.get("by_blocks", {}).items():
        rows.append(
            [
                f"{stage.replace('_', ' ')}, 6 to 56 blocks: R² of a line",
                "≥ 0.98",
                f"{line['r2']:.3f}",
            ]
        )
    lines += _table(["", "wanted", "found"], rows)
    mapped = record["cases"].get("mapped", [])
    if mapped:
        header = [
            "blocks",
            "weights, MB",
            "capture and route, MB",
            "freeze and export, MB",
        ]
        table = [
            [
                str(c["blocks"]),
                f"{c['weights'] / 1e6:.0f}",
                *(f"{peak / 1e6:.0f}" for peak in c["private_peak"].values()),
            ]
            for c in mapped
        ]
        lines += [
            "",
            (
                "With weights that are mapped from a safetensors file into a model that was made on the meta device: the most "
                "memory that has no file behind it."
            ),
            "",
            *_table(header, table),
        ]
        found = record["summary"].get("mapped")
        if found:
            lines += [
                "",
                (
                    f"The larger of the two grows by {found['per_byte_of_weights']:.2f} bytes per byte of all weights, beside "
                    f"{found['imports'] / 1e6:.0f} MB for the imports and {found['per_byte_of_a_block']:.1f} bytes per byte of the one block "
                    f"that is being tried. For FLUX.1 in float32 (48 GB of weights) that says {found['of_flux_in_float32'] / 1e9:.0f} GB; "
                    "it was not run."
                ),
            ]
    return lines


def artifact_size(record: Record) -> list[str]:
    """Bytes."""
    rows = [
        [
            f"{case['width']}, {case['blocks']}",
            str(case["buckets"]),
            f"{case['onnx_over_weights_of_one']:.3f} ×",
            f"{case['all_over_weights_of_one']:.3f} ×",
        ]
        for case in record["cases"]
    ]
    header = ["width, blocks", "buckets", "graphs and weights", "with golden outputs"]
    return [
        "## Bytes of an artifact",
        "",
        "Against one plain dense export. Wanted: at most 1.02 ×.",
        "",
        *_table(header, rows),
    ]


def load_memory(record: Record) -> list[str]:
    """Resident memory."""
    rows = [
        [
            f"{case['width']}, {case['blocks']}",
            f"{case['weights'] / 1e6:.0f} MB",
            f"{case['resident_over_dense']:.2f} ×",
            f"{case['proportional_over_dense']:.2f} ×",
        ]
        for case in record["cases"]
    ]
    header = ["width, blocks", "weights", "8 buckets, resident", "each page once"]
    return [
        "## Memory with all buckets loaded",
        "",
        "Against one session of the plain dense export. Wanted: at most 1.25 ×.",
        "",
        *_table(header, rows),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _origin(name: str, record: Record) -> str:
    machine, versions = record["machine"], record["environment"]
    return (
        f"[{name}.json](../benchmarks/results/{name}.json), {record['date']}, {machine['processor']}, "
        f"{machine['cores']} cores, torch {versions['torch']}, onnxruntime {versions['onnxruntime']}."
    )


SECTIONS: dict[str, Callable[[Record], list[str]]] = {
    "speedup": speedup,
    "routing_overhead": routing_overhead,
    "routing_gap": routing_gap,
    "peers": peers,
    "cost_model": cost_model,
    "export_cost": export_cost,
    "artifact_size": artifact_size,
    "load_memory": load_memory,
}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    sys.exit(0)
