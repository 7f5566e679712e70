"""Which of the routable blocks are routed: ``routing.include`` and ``routing.exclude``.

An entry is the name of a block, which stands for its parts too, or ``re:`` and a regular expression that
is searched for in the names. An entry that fits no block is an error: it would silently do nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from diffcr_compile.blocks import Refusal
from diffcr_compile.config import RoutingConfig
from diffcr_compile.did_you_mean import did_you_mean
from diffcr_compile.errors import UsageError
from diffcr_compile.legality import Findings

PREFIX = "re:"
SHOWN = 8


def choose_blocks(findings: Findings, config: RoutingConfig) -> Findings:
    """The findings with the blocks that the settings leave out among the refused ones.

    Raises:
        UsageError: an entry fits no candidate, or is no regular expression.
    """
    if not config.include and not config.exclude:
        return findings
    names = [b.name for b in findings.blocks] + [r.block for r in findings.refused]
    included = [_fitting(entry, "include", names) for entry in config.include]
    excluded = {
        name: entry for entry in config.exclude for name in _fitting(entry, "exclude", names)
    }
    wanted = set().union(*included) if included else set(names)
    blocks, left_out = [], []
    for spec in findings.blocks:
        if spec.name in excluded:
            reason = f"left out by routing.exclude ({excluded[spec.name]})"
            left_out.append(Refusal(spec.name, reason))
        elif spec.name not in wanted:
            left_out.append(Refusal(spec.name, "not among routing.include"))
        else:
            blocks.append(spec)
    return dataclasses.replace(
        findings, blocks=tuple(blocks), refused=(*findings.refused, *left_out)
    )


def _fitting(entry: str, setting: str, names: Sequence[str]) -> set[str]:
    """Names that an entry stands for."""
    if entry.startswith(PREFIX):
        try:
            pattern = re.compile(entry.removeprefix(PREFIX))
        except re.error as error:
            raise UsageError(
                f"routing.{setting}: {entry!r} is no regular expression: {error}",
                code="DCR-U054",
            ) from error
        found = {name for name in names if pattern.search(name)}
    else:
        found = {name for name in names if name == entry or name.startswith(f"{entry}.")}
    if found:
        return found
    plain = re.sub(r"[\\^$()?*+]", "", entry.removeprefix(PREFIX))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise UsageError(
        f"routing.{setting}: {entry!r} fits no block{did_you_mean(plain, names)}. The model's candidates "
        f"are {', '.join(names[:SHOWN]) or 'none'}{more}; a pattern is written {PREFIX}<regular expression>.",
        code="DCR-U054",
    )
