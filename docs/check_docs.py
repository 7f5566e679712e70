"""Check what the documents claim: relative links, dotted names and make targets exist; made pages are up to date.

Run by `make docs` and by tests/test_house.py. Exit status 1 and one line per finding.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {"build", "dist", "node_modules"}
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_NAME = re.compile(r"`(diffcr_compile(?:\.\w+)+)(?:\(\))?`")
_MAKE = re.compile(r"`make ([a-z]+)")


def markdown_files() -> list[Path]:
    """Every markdown file of the repository, outside hidden, build and artifact folders."""
    found = []
    for path in sorted(ROOT.rglob("*.md")):
        folders = path.relative_to(ROOT).parts[:-1]
        if any(part.startswith((".", "out")) or part in SKIPPED_FOLDERS for part in folders):
            continue
        found.append(path)
    return found


def broken_links(path: Path) -> list[str]:
    """Relative link targets in `path` that do not exist; links to sites are not followed."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for target in _LINK.findall(text):
        if "://" in target or target.startswith(("#", "mailto:")):
            continue
        if not (path.parent / target.split("#")[0]).exists():
            broken.append(f"{path.relative_to(ROOT)}: link to {target}, which does not exist")
    return broken


def unknown_names(path: Path) -> list[str]:
    """Dotted names such as `diffcr_compile.verify.verify` in `path` that do not resolve."""
    names = sorted(set(_NAME.findall(path.read_text(encoding="utf-8"))))
    return [
        f"{path.relative_to(ROOT)}: `{name}` does not resolve"
        for name in names
        if not _resolves(name)
    ]


def unknown_targets(path: Path) -> list[str]:
    """Make targets named in `path` that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(_MAKE.findall(path.read_text(encoding="utf-8")))
    return [
        f"{path.relative_to(ROOT)}: `make {name}` is no target"
        for name in sorted(named - targets)
    ]


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module_name = ".".join(parts[:length])
        try:
            value: object = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # only a missing link of this very name means "look for an attribute instead"
            if error.name is None or not module_name.startswith(error.name):
                raise
            continue
        for attribute in parts[length:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


def _made_pages() -> list[str]:
    """Findings about the pages that are made from code and data."""
    findings: list[str] = []
    for name in ("make_targets", "make_errors", "make_jetson", "make_speed"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        findings += module.out_of_date()
    return findings


def main() -> int:
    """Print every finding; 0 when there is none."""
    findings = []
    files = markdown_files()
    for path in files:
        findings += broken_links(path) + unknown_names(path) + unknown_targets(path)
    findings += _made_pages()
    for finding in findings:
        print(finding)
    print(f"{len(files)} documents, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
