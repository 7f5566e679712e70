"""``diffcr bench MODEL --table`` and ``--kit``: what each routed block costs by kept tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from diffcr_compile.commands.options import settings
from diffcr_compile.commands.progress import progress
from diffcr_compile.commands.terminal import console, note, print_json, say, terminal
from diffcr_compile.errors import UsageError

# --config, --set, --inputs, --pipeline-inputs
ModelOptions = tuple[Path | None, list[str] | None, Path | None, Path | None]


@dataclasses.dataclass(frozen=True)
class MeasureOptions:
    """How to measure, see ``latency_bench.measure_latency``."""

    backend: Literal["onnxruntime", "torch"]
    device: Literal["cpu", "cuda"]
    threads: int | None
    stability: float
    rounds: int


def bench_table(
    model: str,
    table: Path | None,
    kit: Path | None,
    options: MeasureOptions,
    given: ModelOptions,
    as_json: bool,
) -> None:
    """Write the kit, the table, or both."""
    from diffcr_compile.durable import write_json_atomic
    from diffcr_compile.latency_bench import measure_latency, write_kit

    routed, config, name = _routed(model, options, given)
    if kit is not None:
        write_kit(routed, config.routing, name, kit)
        tell = note if as_json else say  # stdout is JSON alone then
        tell(
            f"on the device: python -m diffcr_compile.runtime.block_bench {kit} -o table.json"
        )
    if table is None:
        if as_json:
            print_json({"kit": str(kit)})
        return
    with progress() as event:
        found = measure_latency(
            routed,
            config.routing,
            name,
            backend=options.backend,
            device=options.device,
            threads=options.threads,
            stability=options.stability,
            most_rounds=options.rounds,
            progress=lambda done, count: event("blocks", done, count, {}),
        )
    write_json_atomic(table, found)
    if as_json:
        print_json(found)
    else:
        _show(found, table)


def _routed(model: str, options: MeasureOptions, given: ModelOptions) -> tuple[Any, Any, str]:
    import torch
    from torch import nn

    import diffcr_compile as dcr
    from diffcr_compile.blocks import map_leaves
    from diffcr_compile.program import with_batch
    from diffcr_compile.reference.demo import SETTINGS
    from diffcr_compile.sources import load_case

    config_file, assignments, inputs, pipeline_inputs = given
    config = settings(config_file, assignments, SETTINGS if model == "demo" else None)
    case = load_case(model, inputs, pipeline_inputs, bars=terminal.verbosity >= 0)
    network, example = case.model, case.inputs
    if options.backend == "torch" and options.device == "cuda":
        if not isinstance(network, nn.Module):
            raise UsageError(
                "torch on cuda measures a model, not a pipeline; name its component"
            )
        network = network.to("cuda")
        example = map_leaves(
            example,
            lambda _, leaf: leaf.to("cuda") if isinstance(leaf, torch.Tensor) else leaf,
        )
    routed = dcr.route(network, example, config.routing).program
    return with_batch(routed, config.export.batch), config, case.name


def _show(found: Mapping[str, Any], path: Path) -> None:
    shown = Table("blocks", "kept tokens", "ms", "± ms", "of the dense block")
    for group in found["groups"]:
        name = group["blocks"][0]
        more = len(group["blocks"]) - 1
        rows = zip(group["levels"], group["milliseconds"], group["errors"], strict=True)
        for kept, spent, error in rows:
            share = spent / group["milliseconds"][-1]
            shown.add_row(
                f"{name} and {more} more" if more else name,
                str(kept),
                f"{spent:.3f}",
                f"{error:.3f}",
                f"{share:.1%}",
            )
    console.print(shown)
    check = found["check"]
    say(
        f"dense model {found['dense_milliseconds']:.3f} ms; check at other kept tokens: "
        f"{check['predicted_milliseconds']:.3f} ms predicted, "
        f"{check['measured_milliseconds']:.3f} ms measured"
    )
    if not found["stable"]:
        note(
            f"not stable: a figure is uncertain by {found['worst_error']:.1%} of its dense block, "
            f"{found['stability']:.1%} was asked for; measure on a quiet machine, or with more --rounds"
        )
    say(f"table: {path}")
