"""Every code block of the how-to pages is run, in the order of the page, in a folder of its own.

The first page, which installs the package, is run by ``test_first_steps.py``.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import pipelines
from tests.test_cli import run

HOWTO = Path(__file__).resolve().parent.parent / "docs" / "howto"
FIRST = "first_steps.md"
PAGES = sorted(path.name for path in HOWTO.glob("*.md"))
# Whole compilations beyond the three of the first steps: minutes on a slow machine.
LONG = {"budget.md", "pipeline.md", "resolutions.md"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
LANGUAGES = {"python", "bash", "yaml"}
# Pages that use files which first_steps.md shows.
SHARED = ("my_dit.py", "quick.yaml")
# What a page calls "your pipeline", and files that a reader has before.
TENSORS = (
    "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)  # fmt: skip


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((HOWTO / page).read_text(encoding="utf-8"))


def shown_files(page: str) -> dict[str, str]:
    found = {}
    for _, text in blocks(page):
        name = FILE.match(text)
        if name:
            found[name[1]] = text
    return found


def tiny_pixart_pipeline() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    pipe, inputs = pipelines.pixart()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**inputs, "guidance_scale": 4.5}


def write_what_a_reader_has(folder: Path) -> None:
    """A saved pipeline, and the tensors of its call."""
    pipe, inputs = tiny_pixart_pipeline()
    pipe.save_pretrained(folder / "pixart")
    save_file({name: inputs[name].clone() for name in TENSORS}, folder / "call.safetensors")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in SHARED:
        (tmp_path / name).write_text(shown_files(FIRST)[name])
    write_what_a_reader_has(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.soak] if p in LONG else [])
        for p in PAGES
        if p != FIRST
    ],
)
def test_the_code_of_a_page_runs(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "page", "tiny_pixart_pipeline": tiny_pixart_pipeline}
    ran = 0
    for language, text in blocks(page):
        name = FILE.match(text)
        if name:
            (place / name[1]).write_text(text)
        elif language == "python":
            exec(compile(text, f"{page}, block {ran}", "exec"), names)
        elif language == "bash":
            for line in text.strip().splitlines():
                command, *arguments = shlex.split(line)
                assert command == "diffcr", line
                assert run(monkeypatch, *arguments) == 0, f"{line}\n{capsys.readouterr().err}"
        ran += 1
    assert ran
    for module in ("my_dit", "their_model"):
        sys.modules.pop(module, None)


def test_every_block_is_in_a_language_that_is_run() -> None:
    for page in PAGES:
        text = (HOWTO / page).read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(page)), page
        assert {language for language, _ in blocks(page)} <= LANGUAGES, page
