"""Pictures of a report for the documents: ``python docs/make_screenshots.py out/report/report.html``.

On a desktop, in the dark and on a phone, by a Chromium without a window. Writes ``docs/pictures/report_*.png``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).resolve().parent / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# name -> width and height of the window in pixels, scheme (0 dark, 1 light), and where in the page. A window is at least
# 500 wide, so a phone is a frame.
VIEWS = {
    "desktop": (1100, 1500, 1, ""),
    "maps": (1100, 1500, 1, "#keep"),
    "dark": (1100, 1500, 0, ""),
    "phone": (390, 1400, 1, ""),
}
FRAME = """<!doctype html><style>body{margin:0}iframe{border:0;width:%dpx;height:%dpx}</style>
<iframe src="%s"></iframe>"""
COLORS = 256


def browser() -> str:
    """The program, or the end with a word."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    return found


def take(page: Path, name: str, target: Path) -> None:
    """One picture."""
    width, height, scheme, where = VIEWS[name]
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            FRAME % (width, height, page.resolve().as_uri() + where), encoding="utf-8"
        )
        shot = Path(folder) / "shot.png"
        command = [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--allow-file-access-from-files", "--force-prefers-reduced-motion", f"--user-data-dir={folder}/profile",
            f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={max(width, 500)},{height + 200}",
            "--virtual-time-budget=4000", f"--screenshot={shot}", frame.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as picture:
            cut = picture.convert("RGB").crop((0, 0, width, height))
            cut.quantize(COLORS).save(target, optimize=True)


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="report.html")
    page = parser.parse_args().page
    for name in VIEWS:
        take(page, name, PICTURES / f"report_{name}.png")
        print(PICTURES / f"report_{name}.png")


if __name__ == "__main__":
    main()
