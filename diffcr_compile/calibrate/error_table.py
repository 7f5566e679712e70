"""What it costs in accuracy to keep fewer tokens: one block, one timestep bucket, one level at a time.

With warm-started routers and every other block whole, a block is run at a few of its levels and the
model's output is compared with the dense one. The error is nearly flat once a block has lost a quarter
of its tokens (bypassing a block for all of them is hardly worse), so the best schedule keeps most
blocks whole and a few at very little, which no gradient at the current ratios can see. A knapsack over
this table finds it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.calibrate.shared_prefix import SharedPrefix
from diffcr_compile.errors import AccuracyError
from diffcr_compile.program import Program, selector_name
from diffcr_compile.progress import Progress
from diffcr_compile.schedule import CostTable, Floats, TokenSchedule

# Where the error is measured, in keep ratio; between these it is interpolated.
PROBES = (0.0, 0.25, 0.5, 0.75)


@torch.no_grad()
def measure_errors(
    program: Program,
    states: TeacherStates,
    chosen: list[Tensor],
    costs: CostTable,
    around: TokenSchedule | None = None,
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """Mean squared error of the output for every block, timestep bucket and level.

    Args:
        program: ROUTED, routers warm-started.
        states: where inputs and the dense model's outputs are taken from.
        chosen: per timestep bucket, the indices of the states to use.
        costs: the levels of each block.
        around: what all other blocks keep; None for all tokens.
        progress: called with (forwards done, forwards); there are several per block and bucket. What comes before a
            block runs once, so a forward is half a one in the mean.

    Raises:
        AccuracyError: an output is NaN or infinite, or too far off for a square.

    Returns:
        Block -> (buckets, levels). Without `around`, and with the `straight_through` gate and untrained
        weights, 0 where all tokens are kept.
    """
    batched = batched_inputs(program)
    inputs = [states.take(rows, batched) for rows in chosen]
    selectors = program.module.selectors
    runs = SharedPrefix(program)
    places = {node.target: node for node in program.graph.find_nodes(op="call_module")}
    columns = [
        {
            name: around.kept_tokens[name][bucket] if around else selector.num_tokens
            for name, selector in selectors.items()
        }
        for bucket in range(len(chosen))
    ]
    others = [
        {name: _measured(costs.levels[name]) - {kept} for name, kept in column.items()}
        for column in columns
    ]
    done, count = 0, sum(1 + sum(map(len, levels.values())) for levels in others)

    def error(bucket: int) -> float:
        nonlocal done
        done += 1
        if progress:
            progress(done, count)
        found = mse_loss(runs.rest()[0].float(), inputs[bucket][1].float()).item()
        if not math.isfinite(found):
            raise AccuracyError(
                f"timestep bucket {bucket}: the error of the model's output, which says what blocks cost, is {found}. "
                "Look for NaN, infinite or very large values in the model's weights, its inputs and the targets of the "
                "calibration data.",
                code="DCR-Q010",
            )
        return found

    was_training = program.module.training
    program.module.eval()
    errors = {name: np.zeros((len(chosen), len(costs.levels[name]))) for name in selectors}
    try:
        for bucket, column in enumerate(columns):
            for name, kept in column.items():
                selectors[name].keep(kept)
            runs.begin(inputs[bucket][0][name] for name in program.signature.inputs)
            present = error(bucket)
            for name, selector in selectors.items():  # in running order
                runs.go_to(places[selector_name(name)])
                levels = costs.levels[name]
                found = {column[name]: present}
                for kept in others[bucket][name]:
                    selector.keep(kept)
                    found[kept] = error(bucket)
                selector.keep(column[name])
                known = sorted(found)
                errors[name][bucket] = np.interp(levels, known, [found[k] for k in known])
    finally:
        for selector in selectors.values():
            selector.keep(selector.num_tokens)
        program.module.train(was_training)
    return errors


def relative_errors(errors: dict[str, Floats], costs: CostTable) -> dict[str, Floats]:
    """The same table, with half the tokens of a typical block weighing 1 in every timestep bucket.

    So a bucket counts by its steps, and not by how large its errors happen to be.
    """
    half = [row[:, _half(costs.levels[name])] for name, row in errors.items()]
    typical = np.median(np.stack(half), axis=0) + 1e-30  # (buckets,)
    return {name: row / typical[:, None] for name, row in errors.items()}


def _half(levels: tuple[int, ...]) -> int:
    """Which level is nearest to half the tokens."""
    return min(range(len(levels)), key=lambda i: abs(levels[i] - levels[-1] / 2))


def _measured(levels: tuple[int, ...]) -> set[int]:
    """All tokens, and the levels nearest to the probed keep ratios."""
    below = np.array(levels[:-1])
    probes = PROBES if below.size else ()
    return {
        levels[-1],
        *(int(below[np.abs(below - p * levels[-1]).argmin()]) for p in probes),
    }
