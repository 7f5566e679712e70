"""Write docs/targets.md from the YAML files in export/targets; `make docs` checks that it is up to date.

python docs/make_targets.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "targets.md"
HEAD = """# Targets

What the devices that graphs are made for take. Made by `docs/make_targets.py` from
[export/targets](../export/targets): change the YAML files, not this page. Sources stand in the files.

    diffcr lint out/ --target jetson-orin-nx            # is everything in these graphs taken? exit code 3 if not
    diffcr inspect MODEL --target jetson-thor@jp7.1     # a forecast before anything is compiled
    diffcr compile MODEL --set 'export.target=["rtx"]'  # graphs made for it, and refused if they do not suit

A target of your own is a YAML file with the same keys: `--target boards/mine.yaml`, or `--targets boards/` for a folder, which
may hold `importers/` and `bugs/` too. Where K is larger than a target's TopK, `export.target` (or `dcr.freeze(...,
target=...)`) makes a graph that selects the same tokens otherwise ([0014](decisions/0014-large-k.md)).
"""


def page() -> str:
    """The whole page."""
    from diffcr_compile.planning.targets import all_targets

    targets = all_targets()
    lines = [
        HEAD,
        *_limits(targets),
        "",
        *_forbidden(targets),
        "",
        *_bugs(targets),
        "",
        *_remarks(targets),
    ]
    return "\n".join(lines) + "\n"


def out_of_date() -> list[str]:
    """One finding if the page is not what the YAML files say."""
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return []
    return ["docs/targets.md is not up to date: run python docs/make_targets.py"]


def _limits(targets: Sequence) -> Iterator[str]:
    yield "## Limits\n"
    yield "| target | device | runtime | SM | memory | opset | IR | TopK | operators | floating types |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for t in targets:
        names = ", ".join(f"`{name}`" for name in (t.name, *t.aliases))
        memory = f"{t.memory_bytes / 1e9:.0f} GB" if t.memory_bytes else "varies"
        shared = ", shared" if t.unified_memory and t.sm else ""
        cells = (
            names,
            t.device,
            t.runtime,
            ", ".join(map(str, t.sm)) or "–",
            memory + shared,
            f"{t.min_opset}–{t.max_opset}",
            f"≤ {t.max_ir}",
            f"K ≤ {t.max_topk}" if t.max_topk else "any K",
            f"{len(t.operators)} of importer {t.importer}" if t.operators else "the standard",
            ", ".join(t.dtypes),
        )
        yield f"| {' | '.join(cells)} |"


def _forbidden(targets: Sequence) -> Iterator[str]:
    yield "## Refused spellings\n"
    yield "| rule | operator | reason | targets |"
    yield "|---|---|---|---|"
    rules = {s.id: s for t in targets for s in t.forbidden}
    for name, rule in sorted(rules.items()):
        where = [t.name for t in targets if rule in t.forbidden]
        yield f"| `{name}` | {rule.op.replace(' ', ', ')} | {rule.reason} | {', '.join(where)} |"


def _bugs(targets: Sequence) -> Iterator[str]:
    yield "## Known wrong results\n"
    yield "Reported by users, by version and SM. `diffcr lint` warns where a graph has what stands under *when*.\n"
    yield "| id | when | effect | what to do | threads | targets |"
    yield "|---|---|---|---|---|---|"
    bugs = {bug.id: bug for t in targets for bug in t.bugs}
    for name, bug in sorted(bugs.items()):
        where = [t.name for t in targets if bug in t.bugs]
        cells = (
            f"`{name}`",
            bug.when or "not known",
            bug.effect,
            bug.remedy,
            ", ".join(_link(thread) for thread in bug.threads),
            ", ".join(where),
        )
        yield f"| {' | '.join(cells)} |"


def _remarks(targets: Sequence) -> Iterator[str]:
    yield "## Remarks\n"
    for t in targets:
        for remark in t.remarks:
            yield f"* {t.name}: {remark}"


def _link(thread: str) -> str:
    repository, _, number = thread.partition("#")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
