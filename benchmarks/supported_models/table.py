"""Counts, verdicts and the document, all made from nothing but the entries."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.supported_models.settings import ONNX_PARITY, PARITY, PERMUTATION, STEPS

TITLES = {
    "captured": "captured exactly", "routed": "at least one routed unit",
    "all_kept": "bit-equal at keep ratio 1.0", "parity": "parity at keep ratio 0.5",
    "permutation": "tokens of every routed unit may be permuted",
    "onnx": "ONNX Runtime agrees with FROZEN", "rtx": "TensorRT-RTX engine for SM86 is built",
}  # fmt: skip
COLUMNS = (
    "class", "kind", "captured exactly", "routed units", "bit-equal at 1.0", "parity at 0.5",
    "ONNX parity", "RTX build SM86", "verdict", "reasons for each no",
)  # fmt: skip


def verdict(entry: Mapping[str, Any]) -> str:
    """``supported``, ``refused`` (rightly), ``wrong`` (refusal missing or with other words) or ``failed``.

    Where the zoo expects its blocks to be refused, parts of these blocks may be routed all the same.
    """
    sizes = entry["sizes"]
    if entry["refused"] is not None:
        if len(sizes) != 2 or not all(_refused_in_words(s, entry["refused"]) for s in sizes):
            return "wrong"
        if not any(size.get("units") for size in sizes):
            return "refused"
    wanted = [step for step in STEPS if step != "rtx" or entry["rtx"]]
    clean = not any(size["failures"] for size in sizes)
    return "supported" if clean and all(holds(entry, step) for step in wanted) else "failed"


def _refused_in_words(size: Mapping[str, Any], words: str) -> bool:
    """Whether the words stand in the refusal, and whatever is routed is a part of such a block."""
    blocks = [
        name
        for name, reason in size.get("not_routed", {}).items()
        if words.lower() in reason.lower()
    ]
    units = size.get("units") or []
    if not units:
        return "refusal" in size and (bool(blocks) or words.lower() in size["refusal"].lower())
    return all(any(unit.startswith(f"{name}.") for name in blocks) for unit in units)


def holds(entry: Mapping[str, Any], step: str) -> bool:
    """Whether a step passed at both sizes."""
    sizes = entry["sizes"]
    return len(sizes) == 2 and all(size["passed"].get(step) is True for size in sizes)


def summarise(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and percentages over the given entries."""
    count = len(entries)
    rows: dict[str, Any] = {"models": count}
    for step in STEPS:
        passed = sum(holds(entry, step) for entry in entries)
        rows[step] = {
            "models": passed,
            "percent": round(100 * passed / count, 1) if count else 0.0,
        }
    rows["verdicts"] = dict(sorted(Counter(verdict(entry) for entry in entries).items()))
    checks = [
        size["permutation"] for e in entries for size in e["sizes"] if "permutation" in size
    ]
    rows["permutation_checks"] = sum(check["checked"] for check in checks)
    rows["permutation_worst"] = max((check["worst"] for check in checks), default=0.0)
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The document, made from nothing but the JSON."""
    environment, entries = report["environment"], report["models"]
    machine = ", ".join(f"{name} {value}" for name, value in environment.items())
    lines = [
        "# Supported models", "",
        "Made by `python -m benchmarks.supported_models`; do not edit. Tiny models with random weights, each at",
        "two token counts and with inputs of two seeds; a step counts when it passes at all of them. Parity is the",
        "relative L2 error against a slow reference that shares no code with the package; tolerances: parity",
        f"{PARITY:.0e}, ONNX Runtime {ONNX_PARITY:.0e}, permutation {PERMUTATION:.0e}, all others exact.", "",
        f"{report['date']}: {machine}.", "",
    ]  # fmt: skip
    if len({entry["code"] for entry in entries}) > 1:
        lines += ["**Rows were made by different versions of the code.** Run it anew.", ""]
    tables = (
        ("Token-denoising classes of diffusers", [e for e in entries if e["kind"] != "handwritten"]),
        ("Handwritten models", [e for e in entries if e["kind"] == "handwritten"]),
    )  # fmt: skip
    for title, rows in tables:
        if rows:
            lines += [f"## {title}", "", *_summary_lines(rows), "", *_table(rows), ""]
    return "\n".join(lines)


def _summary_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    summary = summarise(entries)
    lines = [f"| of {summary['models']} models | passed | share |", "|---|---|---|"]
    for step in STEPS:
        if step == "rtx" and not all(entry["rtx"] for entry in entries):
            continue
        passed = summary[step]
        lines.append(f"| {TITLES[step]} | {passed['models']} | {passed['percent']} % |")
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    checks, worst = summary["permutation_checks"], summary["permutation_worst"]
    lines += ["", f"Verdicts: {verdicts}.", ""]
    lines += [f"Permutation checks with fresh inputs: {checks}, largest error {worst:.0e}."]
    return lines


def _table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for entry in sorted(entries, key=lambda e: (e["kind"], e["name"])):
        cells = [
            entry["name"], entry["kind"], _cell(entry, "captured"), _units(entry),
            _cell(entry, "all_kept"),
            _cell(entry, "parity", lambda s: max(r["error"] for r in s["parity"].values())),
            _cell(entry, "onnx", lambda s: max(s["onnx"]["example"], s["onnx"]["other seed"])),
            _cell(entry, "rtx") if entry["rtx"] else "not run", verdict(entry), _reasons(entry),
        ]  # fmt: skip
        lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    return lines


def _cell(
    entry: Mapping[str, Any], step: str, figure: Callable[[Any], float] | None = None
) -> str:
    if holds(entry, step):
        return "yes" if figure is None else f"{max(figure(s) for s in entry['sizes']):.0e}"
    passed = [str(s["size"]) for s in entry["sizes"] if s["passed"].get(step)]
    return f"size {passed[0]} only" if passed else "no"


def _units(entry: Mapping[str, Any]) -> str:
    counts = [
        f"{len(size.get('units', ()))} of {size.get('candidates', '?')}"
        for size in entry["sizes"]
        if "units" in size or "candidates" in size
    ]
    return ", ".join(dict.fromkeys(counts)) or "0"


def _reasons(entry: Mapping[str, Any]) -> str:
    """Failed steps, then why units are not routed; the same reason of many units once."""
    steps: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for failure in (f for size in entry["sizes"] for f in size["failures"]):
        key = _shape(failure["error"])
        steps.setdefault(key, {})[failure["step"]] = True
        texts.setdefault(key, failure["error"])
    shown = [f"{', '.join(steps[key])}: {text}" for key, text in texts.items()]
    refusals = [r for s in entry["sizes"] for r in s.get("not_routed", {}).values()]
    counts = Counter(_shape(reason) for reason in refusals)
    first = {_shape(reason): reason for reason in reversed(refusals)}
    sizes = max(sum("not_routed" in size for size in entry["sizes"]), 1)
    shown += [f"{-(-n // sizes)} not routed: {first[key][:140]}" for key, n in counts.items()]
    return "; ".join(text[:220] for text in shown)


def _shape(text: str) -> str:
    return re.sub(r"\d[\d.e+-]*", "#", text)[:90]


def _plain(text: str) -> str:
    """Text that markdown leaves alone in a table."""
    for sign in "|<>`*[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
