"""Write requirements-ci.txt: every package that `make venv` installs, by version and sha256 of the file.

    pip install --dry-run --ignore-installed --report one.json -c constraints.txt -e ".[$EXTRAS]"
    python .ci/lock.py one.json ...

Make the reports with CPython 3.11 on x86-64 Linux. Several reports are put together: where machines get other builds of
one version (PyTorch's CPU build and the one on PyPI), each is allowed by its hash. Addresses are left out: a hash says
what a file is, wherever it comes from.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-ci.txt"
PROJECT = "diffcr-compile"
HEAD = """\
# The files that CI installs: CPython 3.11 on x86-64 Linux, every version of constraints.txt with the sha256 of its file.
# Made by .ci/lock.py; `make venv` takes it where interpreter and platform are these, see CONTRIBUTING.md.
"""


def canonical(name: str) -> str:
    """As pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(reports: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, set[str]]]:
    """Name -> version without its local part, and hashes of all files that were chosen for it.

    Raises:
        ValueError: the reports chose different versions, or a file has no hash.
    """
    found: dict[str, tuple[str, set[str]]] = {}
    for report in reports:
        for item in report["install"]:
            name = canonical(item["metadata"]["name"])
            version = item["metadata"]["version"].partition("+")[0]
            if name == PROJECT:
                continue
            digest = (
                item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
            )
            known, hashes = found.setdefault(name, (version, set()))
            if known != version or not digest:
                raise ValueError(f"{name}: {known} and {version}, sha256 {digest}")
            hashes.add(digest)
    return found


def text(pins: Mapping[str, tuple[str, set[str]]]) -> str:
    """The file."""
    lines = []
    for name, (version, hashes) in sorted(pins.items()):
        sums = [f"    --hash=sha256:{digest}" for digest in sorted(hashes)]
        lines.append(" \\\n".join([f"{name}=={version}", *sums]))
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Read the reports, write the file."""
    reports = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    if not reports:
        sys.exit(__doc__)
    LOCK.write_text(text(pinned(reports)))


if __name__ == "__main__":
    main()
