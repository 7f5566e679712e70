"""The report in a real browser: nothing in the console, no sideways scrolling, every picture, nothing run."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffcr_compile.report import write_html, write_importance, write_sample_sheet
from tests.report_example import example_report

BROWSER = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
WIDTHS = {"phone": 390, "desktop": 1280}
HOSTILE = '</title><script>document.title="run"</script><img src=x onerror="document.title=1">'
# The page in a frame of the wanted width; the script outside of it looks in and writes what it finds.
HARNESS = """<!doctype html><meta charset="utf-8"><title>waiting</title>
<body style="margin:0"><iframe id="page" style="border:0;width:%(width)dpx;height:%(height)dpx"
 srcdoc="%(page)s"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const inside = frame.contentDocument, root = inside.documentElement;
  const images = [...inside.images];
  document.body.dataset.found = JSON.stringify({
    scroll: root.scrollWidth, width: root.clientWidth, height: root.scrollHeight,
    images: images.length, broken: images.filter((i) => !i.complete || !i.naturalWidth).length,
    scripts: inside.scripts.length, title: inside.title,
    handlers: inside.querySelectorAll("[onerror],[onload],[onclick]").length,
    outside: [...inside.querySelectorAll("[src],link[href]")]
      .map((e) => e.src || e.href).filter((s) => !s.startsWith("data:")).length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: inside.defaultView.getComputedStyle(inside.body).backgroundColor,
    text: inside.body.innerText,
  });
};
</script>"""

needs_browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("DIFFCR_NEEDS_BROWSER"),
    reason="no chromium here; .ci/run installs it and sets DIFFCR_NEEDS_BROWSER, which makes this a failure",
)


def browse(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER, "chromium is missing: apt-get install chromium"
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--virtual-time-budget=4000", "--enable-logging=stderr", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full report with hostile names in it."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    report = example_report()
    for name in ("samples_dense", "samples_compressed"):
        write_sample_sheet(random.uniform(-1, 1, (20, 1, 32, 32)), folder / f"{name}.png")
    write_importance(
        random.normal(size=(6, 3, 1, 32, 32)),
        random.uniform(size=(6, 3, 16, 16)),
        folder / "importance.png",
    )
    report["pictures"]["importance"] = "importance.png"
    report["drift"] = {"timesteps": [900.0, 500.0, 100.0], "relative_l2": [0.01, 0.05, 0.09]}
    report["speedup"]["stability"] = {"spread": 0.03, "allowed": 0.1, "steady": True}
    report["title"] = f"{report['title']} {HOSTILE}"
    report["model"]["name"] = HOSTILE
    report["warnings"].append(HOSTILE)
    first = next(iter(report["schedule"]))
    for part in (report["schedule"], report["num_tokens"], report["macs"]["per_block"]):
        part[HOSTILE] = part.pop(first)
    return write_html(report, folder)


def look(page: Path, width: int, folder: Path, *arguments: str) -> dict[str, Any]:
    """What the browser finds in the page at a width."""
    harness = folder / f"harness_{width}.html"
    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    harness.write_text(HARNESS % {"width": width, "height": 900, "page": source})
    done = browse(
        f"--window-size={max(width, 800)},900", *arguments, "--dump-dom", harness.as_uri()
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@needs_browser
@pytest.mark.parametrize("name", WIDTHS)
def test_the_page_fits_and_shows_everything(name: str, page: Path, tmp_path: Path) -> None:
    found = look(page, WIDTHS[name], tmp_path)
    assert found["width"] == WIDTHS[name]
    assert found["scroll"] <= found["width"]  # no sideways scrolling of the page
    assert (found["images"], found["broken"], found["outside"]) == (3, 0, 0)
    assert (found["scripts"], found["handlers"]) == (0, 0)
    assert HOSTILE in found["title"]  # as text
    for words in (
        "Pass",
        "What the routers look at",
        "Drift of the trajectory",
        "steady",
        "breaks even",
    ):
        assert words in found["text"]


@needs_browser
def test_dark_and_light_follow_the_reader(page: Path, tmp_path: Path) -> None:
    light = look(page, 1280, tmp_path, "--blink-settings=preferredColorScheme=1")
    dark = look(page, 1280, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (light["dark"], dark["dark"]) == (False, True)
    assert light["paper"] == "rgb(253, 253, 252)"
    assert dark["paper"] == "rgb(21, 24, 27)"


@needs_browser
def test_the_console_stays_empty_and_the_page_prints(page: Path, tmp_path: Path) -> None:
    done = browse(
        f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,2000", page.as_uri()
    )
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "page.png").stat().st_size > 20_000
    noisy = (
        tmp_path / "noisy.html"
    )  # the same page with a script, which its own policy forbids
    noisy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", "<script>1</script></body>")
    )
    assert "CONSOLE" in browse("--dump-dom", noisy.as_uri()).stderr
    browse(f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 12


def test_ci_installs_a_browser_or_fails_loudly() -> None:
    text = (Path(__file__).resolve().parent.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "apt-get install" in text
    assert "DIFFCR_NEEDS_BROWSER=1" in text
