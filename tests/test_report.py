"""The report: every section, hostile text, nulls, numbers, pictures, one-step replacement."""

from __future__ import annotations

import base64
import copy
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffcr_compile.errors import AccuracyError, ArtifactError, ResourceError, UsageError
from diffcr_compile.report import text, write_html, write_keep_map, write_sample_sheet
from diffcr_compile.report.charts import Line, line_chart, ticks
from diffcr_compile.report.pictures import GAP, replace_file
from tests.report_example import SCHEDULE, TOKENS, block_macs, example_report

SECTIONS = [
    "checks", "budget", "speedup", "size", "keep", "macs", "parity", "quality", "calibration",
    "cost", "warnings", "refused", "environment", "repeat",
]  # fmt: skip
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: tags, attributes, and the text and table cells per section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = "header"
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[self.section][-1][-1] += data + " "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = np.linspace(-1, 1, 12 * 8 * 8).reshape(12, 1, 8, 8)
    write_sample_sheet(images, tmp_path / "samples_dense.png")
    write_sample_sheet(-images, tmp_path / "samples_compressed.png")
    return tmp_path


def render(report: dict[str, Any], folder: Path) -> Page:
    return Page(write_html(report, folder).read_text("utf-8"))


def spaced(words: str) -> str:
    """Plain spaces, so that expectations can be typed."""
    return re.sub(r"\s+", " ", words.replace("\u202f", " "))


def test_every_section_is_there_in_order_and_well_formed(folder: Path) -> None:
    page = render(example_report(), folder)
    ids = [a["id"] for tag, a in page.tags if tag == "section"]
    assert ids == SECTIONS
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{i}" for i in SECTIONS]
    assert page.open == []
    assert all(page.text[section].strip() for section in SECTIONS)


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    source = write_html(example_report(), folder).read_text("utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<script|<link|<iframe", source)
    for tag, attributes in Page(source).tags:
        target = attributes.get("src") or attributes.get("href")
        if target is not None:
            assert target.startswith("data:image/png;base64," if tag == "img" else "#")


def test_pictures_are_embedded_byte_for_byte_dense_first(folder: Path) -> None:
    page = render(example_report(), folder)
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    embedded = [base64.b64decode(s.partition(",")[2]) for s in sources]
    names = ("samples_dense.png", "samples_compressed.png")
    assert embedded == [(folder / name).read_bytes() for name in names]


def test_heat_map_has_each_kept_count_and_its_ratio(folder: Path) -> None:
    page = render(example_report(), folder)
    head, *rows, means = page.rows["keep"]
    assert [c.strip() for c in head[1:5]] == ["t 0 – 250", "t 250 – 500", "t 500 – 750", "t 750 – 1000"]  # fmt: skip
    for i, (row, kept) in enumerate(zip(rows, SCHEDULE, strict=True)):
        assert row[0].strip() == f"transformer_blocks.{i}"
        assert [int(cell.split()[0]) for cell in row[1:5]] == kept
        shown = [float(spaced(cell).split()[1]) for cell in row[1:5]]
        assert shown == pytest.approx([100 * k / TOKENS for k in kept], abs=0.51)
    columns = [100 * sum(column) / 8 / TOKENS for column in zip(*SCHEDULE, strict=True)]
    assert [float(c.split()[0]) for c in means[1:5]] == pytest.approx(columns, abs=0.51)
    shades = [a["style"] for tag, a in page.tags if tag == "td" and a.get("class") == "cell"]
    assert shades == [f"--keep: {k / TOKENS:.4f}" for row in SCHEDULE for k in row]


def test_macs_table_counts_block_router_and_moved_bytes(folder: Path) -> None:
    rows = render(example_report(), folder).rows["macs"]
    first = spaced(rows[1][4])  # block 0, second bucket from the right: 208 of 256 tokens
    assert block_macs(208) == pytest.approx(52.0e6, rel=0.002)
    assert "52.0 M · 77 %" in first
    assert "routing 32.8 k" in first
    assert "moves 312 KiB" in first
    total = sum(block_macs(row[3]) for row in SCHEDULE)
    assert f"{total / 1e6:.0f} M" in spaced(rows[-1][5])


def test_budget_speed_size_parity_and_quality_figures(folder: Path) -> None:
    page = render(example_report(), folder)
    words = {section: spaced(content) for section, content in page.text.items()}
    for section, expected in {
        "header": [
            "Pass",
            "4 of 4 checks hold",
            "59.67 %",
            "1.81×",
            "101.30 %",
            "5.87",
            "2.81 M",
        ],
        "budget": ["60.00 %", "59.67 %", "−0.33 points", "not above"],
        "speedup": ["1.81×", "1.68×", "4.10 s", "2.27 s", "4.31 s", "threads"],
        "size": ["10.9 MiB", "11 584 921", "101.30 %"],
        "parity": ["bit-equal", "2.40e−6", "1.00e−4", "0.999999987"],
        "quality": [
            "KID x 1000",
            "4.21",
            "5.87",
            "+1.66",
            "19.4 dB",
            "87.11 %",
            "256",
            "0, 1, 2",
        ],
        "cost": ["5 min 12 s", "42.0 ms", "1.31 GiB", "7 min 24 s"],
        "repeat": ["diffcr demo -o out --budget 60% --seed 0"],
        "refused": ["pos_embed.proj", "a convolution mixes"],
    }.items():
        for figure in expected:
            assert figure in words[section], (section, figure)
    ratios = [4.12 / 2.27, 4.05 / 2.25, 4.31 / 2.36, 4.08 / 2.24, 4.10 / 2.30]
    assert [c.strip() for c in page.rows["speedup"][3][1:6]] == [f"{r:.2f}×" for r in ratios]
    assert len(page.rows["parity"]) == 1 + 9


@pytest.mark.parametrize(
    "evil",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "' x='"],
)
def test_hostile_text_stays_text_everywhere(folder: Path, evil: str) -> None:
    plain = render(example_report(), folder)
    report = poison(example_report(), evil)
    page = render(report, folder)
    count = {tag for tag, _ in page.tags} - {tag for tag, _ in plain.tags}
    assert count == set()
    attributes = {name for _, a in page.tags for name in a}
    assert attributes == {name for _, a in plain.tags for name in a}
    assert page.rows["keep"][1][0].strip() == f"{evil}transformer_blocks.0"
    for section in ("header", "checks", "warnings", "refused", "environment", "repeat"):
        assert evil in page.text[section]


def poison(value: Any, evil: str) -> Any:
    """The report with ``evil`` before every free text and every free key."""
    fixed = {"created", "verdict", "pictures", "timestep_buckets", "history"}
    free_keys = {"schedule", "num_tokens", "per_block", "environment", "seconds"}

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            front = evil if key in free_keys else ""
            return {front + k: v if k in fixed else walk(v, k) for k, v in node.items()}
        if isinstance(node, list):
            return [walk(item, key) for item in node]
        return evil + node if isinstance(node, str) else node

    return walk(value, "")


@pytest.mark.parametrize(
    ("key", "section", "line"),
    [
        ("speedup", "speedup", "Speed-up was not measured in this run."),
        ("quality", "quality", "Quality was not measured in this run."),
        ("calibration", "calibration", "no curve was measured."),
        ("pictures", "quality", "No sample pictures were made in this run."),
    ],
)
@pytest.mark.parametrize("absent", [False, True])
def test_null_section_says_in_one_line_that_it_was_not_measured(
    folder: Path, key: str, section: str, line: str, absent: bool
) -> None:
    report = example_report() | {key: None}
    if absent:
        del report[key]
    page = render(report, folder)
    assert line in page.text[section]
    if key in ("speedup", "calibration"):
        assert section not in page.rows
    if key in ("speedup", "quality"):
        assert "not measured" in page.text["header"]


def test_nulls_inside_the_sections(folder: Path) -> None:
    report = example_report()
    report["speedup"] |= {"onnxruntime_cpu_loop": None, "conditions": None}
    report["quality"] = {
        "metric": "KID",
        "num_samples": 8,
        "dense": math.nan,
        "compressed": None,
    }
    report["calibration"]["history"] = []
    report |= {
        "checks": [],
        "warnings": [],
        "seconds": {},
        "peak_rss_bytes": {},
        "commands": [],
    }
    report["quality"]["compressed"] = 2.0
    report["model"]["refused_blocks"] = []
    page = render(report, folder)
    assert "The sampling loop was not measured in this run." in page.text["speedup"]
    assert "NaN" in page.text["quality"]
    assert "Calibration recorded no step." in page.text["calibration"]
    assert "None." in page.text["warnings"]
    assert "No check was recorded." in page.text["checks"]


def test_a_report_without_routed_blocks_still_renders(folder: Path) -> None:
    report = example_report() | {"schedule": {}, "num_tokens": {}}
    report["macs"]["per_block"] = {}
    assert "No block is routed." in render(report, folder).text["keep"]
    write_keep_map(report, folder / "keep_map.png")


def test_a_failed_check_makes_the_verdict_fail_whatever_it_claims(folder: Path) -> None:
    report = example_report()
    report["checks"][2]["passed"] = False
    header = spaced(render(report, folder).text["header"])
    assert "Fail — 3 of 4 checks hold; not met: ONNX parity" in header
    assert "The run itself was marked “pass”" in header
    failed = example_report() | {"verdict": "fail"}
    assert "but the run was marked “fail”" in render(failed, folder).text["header"]


def test_calibration_curves_have_one_point_per_recorded_step(folder: Path) -> None:
    page = render(example_report(), folder)
    lines = [a["d"] or "" for tag, a in page.tags if tag == "path" and "aria-hidden" not in a]
    curves = [d for d in lines if d.count("L") > 10]
    assert [d.count("L") + d.count("M") for d in curves] == [
        300
    ] * 4  # loss, reached, asked, mean
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", curves[0])]
    assert ys[-1] > ys[0]  # the loss falls: further down on the page


def test_a_curve_breaks_at_nan_and_thins_out_when_long() -> None:
    gap = line_chart("x", [0, 1, 2, 3], [Line("x", [1.0, math.nan, 2.0, 3.0])], str)
    (path,) = re.findall(r'class="line solid" d="([^"]*)"', gap)
    assert path.count("M") == 2
    assert path.count("L") == 1
    steps = list(range(5000))
    long = line_chart("x", steps, [Line("x", [float(s) for s in steps])], str)
    (path,) = re.findall(r'class="line solid" d="([^"]*)"', long)
    assert path.count("L") == 399
    assert "No finite value" in line_chart("x", [1], [Line("x", [math.inf])], str)
    assert "<b>" not in line_chart("<b>", [1], [Line("x", [1.0])], lambda _: "<b>")


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-3, 1e6, allow_nan=False),
)
def test_ticks_are_few_inside_and_evenly_spaced(low: float, width: float) -> None:
    high = low + width
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert all(low - 1e-6 * width <= m <= high + 1e-6 * width for m in marks)
    gaps = np.diff(marks)
    assert gaps == pytest.approx(np.full(len(gaps), gaps[0]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (text.si, 0, "0"), (text.si, 999, "999"), (text.si, 1000, "1.00 k"),
        (text.si, 999_999, "1.00 M"), (text.si, 2_812_000, "2.81 M"), (text.si, 67.1e9, "67.1 G"),
        (text.size, 0, "0 B"), (text.size, 1023, "1023 B"), (text.size, 1 << 20, "1.00 MiB"),
        (text.size, 1340 << 20, "1.31 GiB"), (text.percent, 0.5987, "59.87 %"),
        (text.percent0, 0.9961, "99.6 %"), (text.percent0, 0.001, "0.1 %"),
        (text.percent0, 0.0, "0 %"), (text.percent0, 1.0, "100 %"), (text.points, -0.0033, "−0.33 points"),
        (text.times, 1.8123, "1.81×"), (text.seconds, 0.042, "42.0 ms"), (text.seconds, 99.96, "1 min 40 s"),
        (text.seconds, 4320, "1 h 12 min"), (text.seconds, 12.34, "12.3 s"), (text.number, 1.23e-6, "1.23e−6"),
        (text.number, 0.0, "0"), (text.number, -4.567, "−4.57"), (text.number, 12345, "12 345"),
        (text.cosine, 1.0, "1"), (text.cosine, 0.999999987, "0.999999987"),
        (text.si, None, "not measured"), (text.seconds, math.nan, "NaN"), (text.size, -math.inf, "−∞"),
        (text.si, "many", "many"), (text.si, True, "True"), (text.si, np.float32(1500), "1.50 k"),
        (text.anything, True, "yes"), (text.anything, [1, 2.5, "a"], "1, 2.5, a"),
        (text.anything, {"a": [None]}, '{"a": [null]}'), (text.anything, None, "none"),
    ],
)  # fmt: skip
def test_numbers_read_well(write: Any, value: Any, expected: str) -> None:
    assert spaced(write(value)) == expected


@given(st.floats(1, 1e17))
def test_si_keeps_three_digits(value: float) -> None:
    number, _, unit = spaced(text.si(value)).partition(" ")
    scale = 1000.0 ** ("", "k", "M", "G", "T", "P").index(unit)
    assert float(number) * scale == pytest.approx(value, rel=6e-3)


@pytest.mark.parametrize("key", ["budget", "schedule", "commands", "title"])
def test_an_incomplete_report_is_refused_by_key(folder: Path, key: str) -> None:
    report = example_report()
    del report[key]
    with pytest.raises(ArtifactError, match=f"found no {key}"):
        write_html(report, folder)


def test_contradictions_are_refused(folder: Path) -> None:
    deep, wrong_rows, over, version = (copy.deepcopy(example_report()) for _ in range(4))
    del deep["size"]["onnx_bytes"]
    wrong_rows["schedule"]["transformer_blocks.3"] = [1, 2]
    over["schedule"]["transformer_blocks.3"][0] = TOKENS + 1
    version["schema_version"] = 2
    for report, match in (
        (deep, "onnx_bytes"), (wrong_rows, r"transformer_blocks\.3"), (over, "257"), (version, "schema_version 2"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=match):
            write_html(report, folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["../secret.png", "missing.png", "notes.png", "link.png"])
def test_a_picture_is_a_png_beside_the_report_or_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    write_sample_sheet(np.zeros((1, 1, 2, 2)), tmp_path / "secret.png")
    (folder / "notes.png").write_text("no picture")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    report = example_report() | {"pictures": {"samples_dense": name}}
    with pytest.raises(ArtifactError, match=r"picture"):
        write_html(report, folder)


def test_a_write_that_fails_leaves_the_old_page_and_no_litter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_html(example_report(), folder)
    before, names = target.read_bytes(), sorted(p.name for p in folder.iterdir())

    def fail(*_: object) -> None:
        assert target.read_bytes() == before  # still whole while the new one is written
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        ResourceError, match=r"report\.html cannot be read or written: disk full"
    ):
        write_html(example_report() | {"title": "new"}, folder)
    assert target.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == names
    monkeypatch.undo()
    assert replace_file(target, b"new").read_bytes() == b"new"


def test_the_same_report_gives_the_same_page(folder: Path) -> None:
    assert write_html(example_report(), folder).read_bytes() == write_html(
        example_report(), folder
    ).read_bytes()  # fmt: skip


@pytest.mark.parametrize(
    ("count", "channels", "columns", "scale"), [(12, 1, 10, 2), (3, 3, 10, 1), (20, 1, 5, 3)]
)
def test_sample_sheet_has_every_sample_in_its_place(
    tmp_path: Path, count: int, channels: int, columns: int, scale: int
) -> None:
    height, width = 4, 6
    levels = np.random.default_rng(0).integers(0, 256, (count, channels, height, width))
    path = write_sample_sheet(levels / 127.5 - 1, tmp_path / "sheet.png", columns, scale)
    sheet = np.asarray(Image.open(path))
    across, down = min(columns, count), math.ceil(count / columns)
    assert sheet.shape == (
        down * height * scale + (down - 1) * GAP,
        across * width * scale + (across - 1) * GAP,
        3,
    )
    for i in range(count):
        for y in range(height * scale):
            for x in range(width * scale):
                place = (
                    i // across * (height * scale + GAP) + y,
                    i % across * (width * scale + GAP) + x,
                )
                expected = levels[i, :, y // scale, x // scale]
                assert (sheet[place] == expected).all()


def test_sample_sheet_clips_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    write_sample_sheet(np.array([-3.0, 3.0]).reshape(2, 1, 1, 1), path, scale=1)
    assert np.asarray(Image.open(path))[0, [0, -1], 0].tolist() == [0, 255]
    bad = np.zeros((3, 1, 2, 2))
    bad[1, 0, 0, 0] = math.nan
    with pytest.raises(AccuracyError, match=r"samples \[1\]"):
        write_sample_sheet(bad, path)
    for shape in ((3, 2, 4, 4), (0, 1, 4, 4), (4, 4)):
        with pytest.raises(UsageError, match=re.escape(str(shape))):
            write_sample_sheet(np.zeros(shape), path)
    with pytest.raises(UsageError, match="columns=0"):
        write_sample_sheet(np.zeros((1, 1, 2, 2)), path, columns=0)


def test_keep_map_is_darker_where_more_is_kept(tmp_path: Path) -> None:
    report = example_report() | {
        "schedule": {"<b> " + "x" * 200: [0, 64, 128, 256]},
        "num_tokens": {"<b> " + "x" * 200: 256},
    }
    image = Image.open(write_keep_map(report, tmp_path / "map.png")).convert("RGB")
    row = (
        np.asarray(image)[28 + 92 + 4].astype(int).sum(axis=1)
    )  # inside the cells, above text
    shades = list(dict.fromkeys(row[row < 765].tolist()))
    assert len(shades) == 4
    assert shades == sorted(shades, reverse=True)
    assert image.width < 1300


@pytest.mark.parametrize(
    ("kept", "order", "said"),
    [
        (
            [8, 6, 4],
            [2, 1, 0],
            "The noisier a bucket, the fewer tokens it keeps: .* 40 %, 60 %, 80 %",
        ),
        (
            [8, 8, 4],
            [2, 1, 0],
            "The noisier a bucket, the fewer tokens it keeps: .* 40 %, 80 %, 80 %",
        ),
        ([4, 6, 8], [2, 1, 0], "do not always keep fewer tokens here: .* 80 %, 60 %, 40 %"),
        ([4, 6, 8], [0, 1, 2], "The noisier a bucket, the fewer"),
        ([4, 8, 6], [2, 1, 0], "do not always keep fewer"),
        ([5, 5, 5], [2, 1, 0], "All timestep buckets keep equally many"),
        ([8, 6, 4], [1], None),
        ([8, 6, 4], None, None),
    ],
)
def test_it_says_whether_noisier_buckets_keep_fewer_tokens(
    tmp_path: Path, kept: list[int], order: list[int] | None, said: str | None
) -> None:
    report = example_report()
    report["timestep_buckets"] = [[0, 1], [1, 2], [2, 3]]
    report["schedule"], report["num_tokens"] = {"a": kept, "b": kept}, {"a": 10, "b": 10}
    report["macs"]["per_block"] = {}
    report["noisiest_first"], report["pictures"] = order, None
    write_html(report, tmp_path)
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text["keep"]
    if said is None:
        assert "keep fewer" not in words
        assert "keeps:" not in words
    else:
        assert re.search(said.replace(" %", ".%"), words)
