"""The pictures beside the report: sheets of samples and the keep map, drawn with Pillow."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import AccuracyError, UsageError
from diffcr_compile.report.text import percent0
from diffcr_compile.report.view import KeepRow, bucket_names, keep_rows, mean_ratios

GAP = 2  # pixels between two samples, not scaled
GREY = 128  # of the gaps and of the empty places in the last row
PAPER, INK, FAINT, HEAT = (255, 255, 255), (28, 32, 36), (96, 104, 112), (24, 108, 140)
IMPORTANT = (232, 120, 32)  # tokens that every block processes
CELL_WIDTH, CELL_HEIGHT, EDGE = 150, 56, 28  # pixels of the keep map
LONGEST_NAME = 40  # characters; a longer block name loses its middle


def replace_file(path: Path, data: bytes) -> Path:
    """Write ``data`` under a temporary name in the same folder, then rename it to ``path``.

    Raises:
        ResourceError: the disk is full or cannot be written; an older file at ``path`` is then unchanged.
    """
    atomic_write_bytes(path, data)
    return path


def write_sample_sheet(
    images: npt.NDArray[np.floating[Any]], path: Path, columns: int = 10, scale: int = 2
) -> Path:
    """Write samples as one PNG, left to right, then down, in their order.

    Args:
        images: (count, channels, height, width) with 1 or 3 channels, in [-1, 1]; what lies
            outside is clipped.
        path: where the PNG goes; an older file is replaced in one step.
        columns: samples per row; with fewer samples the sheet is narrower.
        scale: edge of one sample pixel in sheet pixels.

    Raises:
        UsageError: the shape is another one, or ``columns`` or ``scale`` is below 1.
        AccuracyError: a value is not finite.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise UsageError(
            f"sample sheet {path.name}: found images of shape {images.shape}, expected "
            "(count, 1 or 3, height, width), none of them 0. Pass the decoded images."
        )
    if columns < 1 or scale < 1:
        raise UsageError(
            f"sample sheet {path.name}: found columns={columns}, scale={scale}, expected both "
            "to be at least 1."
        )
    if not np.isfinite(images).all():
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3))).tolist()
        raise AccuracyError(
            f"sample sheet {path.name}: found NaN or infinity in samples {bad}, expected finite "
            "values. Look at the parity ladder for the step that made them."
        )
    sheet = _tile(_to_bytes(images, scale), columns)
    return _write_png(Image.fromarray(sheet), path)


def write_importance(
    samples: npt.NDArray[np.floating[Any]],
    shares: npt.NDArray[np.floating[Any]],
    path: Path,
    size: int = 96,
) -> Path:
    """Write samples over denoising steps with the tokens' importance laid over them.

    Args:
        samples: (steps, samples, channels, height, width); shown in grey, each on its own scale.
        shares: (steps, samples, rows, columns) in [0, 1], one number per token.
        path: where the PNG goes.
        size: edge of one picture in pixels; each is shown plain and, below, with the overlay.
    """
    steps, count = samples.shape[:2]
    sheet = Image.new(
        "RGB", (steps * (size + GAP) - GAP, count * 2 * (size + GAP) - GAP), PAPER
    )
    for i in range(count):
        for step in range(steps):
            grey = samples[step, i].mean(axis=0)
            low, high = float(grey.min()), float(grey.max())
            levels = np.rint((grey - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
            plain = (
                Image.fromarray(levels)
                .convert("RGB")
                .resize((size, size), Image.Resampling.NEAREST)
            )
            left, top = step * (size + GAP), 2 * i * (size + GAP)
            sheet.paste(plain, (left, top))
            overlay = _overlay(np.asarray(plain), shares[step, i])
            sheet.paste(overlay, (left, top + size + GAP))
    return _write_png(sheet, path)


def _overlay(
    picture: npt.NDArray[np.uint8], shares: npt.NDArray[np.floating[Any]]
) -> Image.Image:
    """The picture, paler where a token bypasses blocks and tinted where blocks process it."""
    height, width = picture.shape[:2]
    mask = Image.fromarray(np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8))
    weight = (
        np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))[..., None] / 255
    )
    warm = np.array(IMPORTANT, dtype=np.float64)
    mixed = picture * (1 - 0.65 * weight) + warm * 0.65 * weight
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _to_bytes(images: npt.NDArray[np.floating[Any]], scale: int) -> npt.NDArray[np.uint8]:
    """(count, c, h, w) in [-1, 1] → (count, h * scale, w * scale, 3) in 0..255."""
    levels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    coloured = np.broadcast_to(levels, (len(levels), 3, *levels.shape[2:]))
    return coloured.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)


def _tile(samples: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    count, height, width, _ = samples.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    sheet = np.full(shape, GREY, dtype=np.uint8)
    for i, sample in enumerate(samples):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = sample
    return sheet


def write_keep_map(report: Mapping[str, Any], path: Path) -> Path:
    """Write the heat map of keep ratios, block x timestep bucket, as a PNG.

    The kept tokens and the keep ratio stand in every cell, so it reads without colour.

    Raises:
        ArtifactError: the schedule contradicts ``num_tokens`` or ``timestep_buckets``.
    """
    rows, buckets = keep_rows(report), bucket_names(report)
    names = [_plain(row.block) for row in rows]
    bold, plain = ImageFont.load_default(24), ImageFont.load_default(19)
    left = EDGE + int(max((plain.getlength(n) for n in [*names, "mean"]), default=0)) + 20
    width = left + max(len(buckets), 4) * CELL_WIDTH + EDGE
    top = EDGE + 92
    bottom = top + (len(rows) + 1) * CELL_HEIGHT
    image = Image.new("RGB", (width, bottom + 76), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((EDGE, EDGE), "Kept tokens and keep ratio", INK, bold)
    draw.text((left, top - 50), "timestep bucket", FAINT, plain, anchor="lm")
    for j, bucket in enumerate(buckets):
        draw.text(
            (left + (j + 0.5) * CELL_WIDTH, top - 20), _plain(bucket), INK, plain, anchor="mm"
        )
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        _draw_row(draw, (left, top + i * CELL_HEIGHT), name, row)
    for j, ratio in enumerate(mean_ratios(rows)):
        middle = (left + (j + 0.5) * CELL_WIDTH, bottom - CELL_HEIGHT / 2)
        draw.text(middle, _plain(percent0(ratio)), FAINT, plain, anchor="mm")
    draw.text((left - 20, bottom - CELL_HEIGHT / 2), "mean", FAINT, plain, anchor="rm")
    _draw_legend(draw, left, bottom + 14)
    return _write_png(image, path)


def _draw_row(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, row: KeepRow
) -> None:
    left, top = corner
    big, small = ImageFont.load_default(21), ImageFont.load_default(15)
    middle = top + CELL_HEIGHT / 2
    draw.text((left - 20, middle), name, INK, ImageFont.load_default(19), anchor="rm")
    for j, (kept, ratio) in enumerate(zip(row.kept, row.ratios, strict=True)):
        x = left + j * CELL_WIDTH
        box = (x, top, x + CELL_WIDTH - 3, top + CELL_HEIGHT - 3)
        draw.rectangle(box, fill=_heat(ratio))
        draw.text((x + CELL_WIDTH / 2, middle - 9), str(kept), INK, big, anchor="mm")
        draw.text(
            (x + CELL_WIDTH / 2, middle + 13), _plain(percent0(ratio)), INK, small, anchor="mm"
        )


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    length, font = 3 * CELL_WIDTH, ImageFont.load_default(17)
    for x in range(length):
        draw.line((left + x, top, left + x, top + 14), fill=_heat(x / (length - 1)))
    for ratio in (0.0, 0.5, 1.0):
        draw.text((left + ratio * length, top + 28), f"{ratio:g}", FAINT, font, anchor="mm")
    draw.text((left + length + 18, top + 8), "keep ratio", FAINT, font, anchor="lm")


def _heat(ratio: float) -> tuple[int, int, int]:
    """Paper at 0, and at most 60 % of the heat colour, so that the ink stays readable."""
    share = 0.04 + 0.56 * ratio
    red, green, blue = (round(p + (h - p) * share) for p, h in zip(PAPER, HEAT, strict=True))
    return red, green, blue


def _plain(label: str) -> str:
    """The label in the glyphs that Pillow's own font has; a long one loses its middle."""
    label = label.replace("\u202f", " ").replace("–", "-")
    known = "".join(c if c.isascii() and c.isprintable() else "?" for c in label)
    if len(known) <= LONGEST_NAME:
        return known
    half = (LONGEST_NAME - 3) // 2
    return f"{known[:half]}...{known[-half:]}"


def _write_png(image: Image.Image, path: Path) -> Path:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return replace_file(path, buffer.getvalue())
