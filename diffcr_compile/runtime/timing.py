"""Time several things in turns until the figures are stable.

Shared machines drift: what is compared must be measured in the same seconds. Every round runs each thing
once, and what counts is the median over rounds of its time divided by that of a reference in the same round.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

from diffcr_compile.errors import UsageError

WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 7
# Of normally distributed numbers: standard deviation / median absolute deviation, and the standard
# error of a median / that of a mean.
MAD_TO_DEVIATION = 1.4826
MEDIAN_TO_MEAN = 1.2533


@dataclasses.dataclass(frozen=True)
class Timing:
    """One thing, timed in rounds.

    Attributes:
        seconds: of each round.
        share: median over rounds of the time divided by the reference's in that round.
        error: standard error of `share`, from the median absolute deviation.
    """

    seconds: tuple[float, ...]
    share: float
    error: float


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    reference: str,
    stability: float,
    most_rounds: int,
    scale: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `runs` in turns until every share is known to within `stability`, or the rounds are used up.

    Args:
        runs: by name; each call is one unit of work.
        reference: the run that the others are divided by.
        stability: largest standard error of a share, as a part of the share of `scale`.
        most_rounds: at least 7; the first two are not counted and come on top.
        scale: the run whose share is the yardstick of the errors; the reference by default.
        clock: seconds; ``time.process_time`` is for one thread on a machine that others use too.

    Raises:
        UsageError: too few rounds, or no positive stability.
    """
    if most_rounds < LEAST_ROUNDS or not 0 < stability < 1:
        raise UsageError(
            f"at least {LEAST_ROUNDS} rounds and a stability between 0 and 1 are needed, got "
            f"{most_rounds} and {stability}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP_ROUNDS + most_rounds):
        for name, run in runs.items():
            started = clock()
            run()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(clock() - started)
        if turn + 1 >= WARM_UP_ROUNDS + LEAST_ROUNDS:
            found = summarise(seconds, reference)
            if worst_error(found, scale or reference) <= stability:
                break
    return summarise(seconds, reference)


def summarise(seconds: Mapping[str, list[float]], reference: str) -> dict[str, Timing]:
    """Shares and their errors from the seconds of each round."""
    found = {}
    for name, mine in seconds.items():
        shares = [one / of for one, of in zip(mine, seconds[reference], strict=True)]
        middle = statistics.median(shares)
        away = statistics.median(abs(share - middle) for share in shares)
        error = MEDIAN_TO_MEAN * MAD_TO_DEVIATION * away / math.sqrt(len(shares))
        found[name] = Timing(tuple(mine), middle, error)
    return found


def worst_error(timings: Mapping[str, Timing], scale: str) -> float:
    """The largest error of a share, as a part of the share of `scale`."""
    return max(timing.error for timing in timings.values()) / timings[scale].share
