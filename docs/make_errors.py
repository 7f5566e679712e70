"""Write docs/errors.md from diffcr_compile/error_cases.py; `make docs` checks that it is up to date.

python docs/make_errors.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Errors

Every error has a code that stays; the same text comes from Python (`DiffCRError.code`, `.message`, `.case`) and from the command
line, which leaves with the exit code of the error's class. Made by `docs/make_errors.py` from
`diffcr_compile/error_cases.py`: change that file, not this page. A traceback is shown with `-v` only.

| exit code | class | codes |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    from diffcr_compile import errors
    from diffcr_compile.error_cases import CASES

    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    kinds = [k for k in kinds if issubclass(k, errors.DiffCRError)]
    by_letter: dict[str, list[type[errors.DiffCRError]]] = {}
    for kind in kinds:
        by_letter.setdefault(kind.general_code[4], []).append(kind)
    rows = [
        f"| {found[0].exit_code} | `{found[0].__name__}` | DCR-{letter}… |"
        for letter, found in sorted(by_letter.items(), key=lambda item: item[1][0].exit_code)
    ]
    return HEAD + "\n".join([*rows, "", *_cases(CASES.values())])


def _cases(cases) -> Iterator[str]:
    for case in cases:
        yield f'## <a id="{case.code.lower()}"></a>{case.code}: {case.title}\n'
        yield f"{case.cause}\n"
        yield f"**What to do:** {case.remedy}\n"


def out_of_date() -> list[str]:
    """One finding if the page is not what the code says."""
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return []
    return ["docs/errors.md is not up to date: run python docs/make_errors.py"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
