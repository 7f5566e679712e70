"""The report of a compilation: ``report.json`` drawn as one static, offline page.

``write_html`` makes the page, ``write_sample_sheet`` and ``write_keep_map`` its pictures.
"""

from __future__ import annotations

from diffcr_compile.report.html import write_html
from diffcr_compile.report.pictures import (
    write_importance,
    write_keep_map,
    write_sample_sheet,
)

__all__ = ["write_html", "write_importance", "write_keep_map", "write_sample_sheet"]
