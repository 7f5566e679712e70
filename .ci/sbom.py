"""Write a bill of materials of the environment that runs this: CycloneDX 1.6, the same bytes for the same packages.

python .ci/sbom.py build/sbom.json
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "diffcr-compile"
LOCK_LINE = re.compile(
    r"^([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)", re.MULTILINE
)


def bill() -> dict[str, Any]:
    """The project and everything that it needs here, with what needs what."""
    installed = {canonical(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    needs = closure(installed)
    hashes = locked_hashes()
    made: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {**component(installed[PROJECT], {}), "type": "application"}
        },
        "components": [component(installed[n], hashes) for n in sorted(needs) if n != PROJECT],
        "dependencies": [
            {
                "ref": ref(installed[name]),
                "dependsOn": sorted(ref(installed[needed]) for needed in needs[name]),
            }
            for name in sorted(needs)
        ],
    }
    # no clock and no chance: the number follows from what is listed
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(made, sort_keys=True))
    return {**made, "serialNumber": f"urn:uuid:{number}"}


def canonical(name: str) -> str:
    """As pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(installed: dict[str, Distribution]) -> dict[str, set[str]]:
    """Name -> what it needs, for all that the project reaches; an extra counts where what it asks for is installed."""
    found: dict[str, set[str]] = {}
    todo = [PROJECT]
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = {n for n in needed_by(installed[name], name) if n in installed}
            todo += found[name]
    return found


def needed_by(distribution: Distribution, name: str) -> Iterator[str]:
    """Names of requirements that apply here; of the project with all extras, of others without."""
    extras = distribution.metadata.get_all("Provides-Extra") or []
    chosen = extras if name == PROJECT else []
    for line in distribution.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *chosen)):
            yield canonical(requirement.name)


def component(distribution: Distribution, hashes: dict[str, list[str]]) -> dict[str, Any]:
    """An entry of the list."""
    name, version = canonical(distribution.metadata["Name"]), distribution.version
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": ref(distribution),
        "name": name,
        "version": version,
        "purl": ref(distribution),
    }
    licence = distribution.metadata.get("License-Expression") or distribution.metadata.get(
        "License"
    )
    if licence and len(licence) <= 60 and "\n" not in licence:
        entry["licenses"] = [{"license": {"name": licence}}]
    allowed = hashes.get(f"{name}=={version.partition('+')[0]}", [])
    if len(allowed) == 1:  # of several builds it is not known which one is installed
        entry["hashes"] = [{"alg": "SHA-256", "content": allowed[0]}]
    return entry


def ref(distribution: Distribution) -> str:
    """Its package URL."""
    version = distribution.version.replace("+", "%2B")
    return f"pkg:pypi/{canonical(distribution.metadata['Name'])}@{version}"


def locked_hashes() -> dict[str, list[str]]:
    """``name==version`` -> hashes in requirements-ci.txt."""
    text = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8")
    return {
        f"{name}=={version}": re.findall(r"sha256:([0-9a-f]{64})", sums)
        for name, version, sums in LOCK_LINE.findall(text)
    }


def main() -> None:
    """Write it to the path that is given."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bill(), indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(bill()['components'])} packages")


if __name__ == "__main__":
    main()
