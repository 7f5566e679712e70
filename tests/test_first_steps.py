"""A new user's first three cases: the page's own commands, in an environment made from nothing but a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.test_docs_code import (
    BLOCK,
    FIRST,
    HOWTO,
    blocks,
    shown_files,
    write_what_a_reader_has,
)

ROOT = HOWTO.parent.parent
# what the package is made of; links stay links
CLONED = (
    "diffcr_compile",
    "passes",
    "export",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
)
# what would let the new environment see the one that runs the tests
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
SECTIONS = ("## The demo", "## A pipeline of diffusers on disk", "## Your own DiT")


def test_the_commands_of_the_page_run_in_a_fresh_environment(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in CLONED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, clone)
    for name, text in shown_files(FIRST).items():
        (clone / name).write_text(text, encoding="utf-8")
    write_what_a_reader_has(clone)
    script = "\n".join(text for language, text in blocks(FIRST) if language == "bash")
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    # the last line tells which environment has run them
    done = subprocess.run(
        ["bash", "-eu", "-c", f"{script}\ncommand -v diffcr"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.splitlines()[-1] == str(clone / "venv/bin/diffcr")
    assert "Traceback" not in done.stderr
    for out in ("out_demo", "out_pixart", "out_mine"):
        assert (clone / out / "manifest.json").is_file(), out
        assert (clone / out / "report/report.html").is_file(), out


def test_the_readers_own_dit_has_forty_lines_and_each_case_is_one_command() -> None:
    code = shown_files(FIRST)["my_dit.py"].splitlines()[1:]
    assert 35 <= len([line for line in code if line.strip()]) <= 42
    page = (HOWTO / FIRST).read_text(encoding="utf-8")
    for title in SECTIONS:
        section = page.split(title)[1].split("\n## ")[0]
        commands = [text for language, text in BLOCK.findall(section) if language == "bash"]
        assert commands[0].startswith(("diffcr demo", "diffcr compile")), title
