"""How numbers are written in the report: SI units, IEC bytes, percent, and words for null.

Every function accepts what JSON can hold. ``None`` reads "not measured", NaN and infinity
read as such, and anything that is no number is shown as its own text, so that a damaged
report still renders and shows the damage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import Any

NOT_MEASURED = "not measured"
THIN = "\u202f"  # narrow no-break space: a number and its unit never part at a line end


def _numeric(write: Callable[[float], str]) -> Callable[[Any], str]:
    @wraps(write)
    def guarded(value: Any) -> str:
        if value is None:
            return NOT_MEASURED
        if isinstance(value, bool) or not isinstance(value, Real):
            return str(value)
        number = float(value)
        if math.isfinite(number):
            return write(number)
        return "NaN" if math.isnan(number) else ("∞" if number > 0 else "−∞")

    return guarded


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    # 999.5 would print as 1000: move to the next unit where rounding would overflow.
    while abs(value) >= base - 0.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = max(0, 2 - int(math.log10(max(abs(value), 1.0)))) if power else 0
    whole = value == int(value) and power == 0
    text = f"{value:.{digits}f}" if whole or power else f"{value:.3g}"
    return _minus(text) + (THIN + units[power] if units[power] else "")


@_numeric
def si(value: float) -> str:
    """Three significant digits with an SI prefix: 1234567 → "1.23 M"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


@_numeric
def size(value: float) -> str:
    """Bytes in IEC units: 1048576 → "1.00 MiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


@_numeric
def percent(value: float) -> str:
    """A fraction as percent with two decimals: 0.5987 → "59.87 %"."""
    return _minus(f"{100 * value:.2f}") + THIN + "%"


@_numeric
def percent0(value: float) -> str:
    """A fraction as whole percent, but never 0 or 100 for what only rounds to it."""
    whole = round(100 * value)
    if (whole == 100 and value < 1) or (whole == 0 and value > 0):
        return _minus(f"{100 * value:.1f}") + THIN + "%"
    return _minus(str(whole)) + THIN + "%"


@_numeric
def points(value: float) -> str:
    """A difference of two fractions: -0.0033 → "−0.33 points"."""
    return _minus(f"{100 * value:+.2f}") + THIN + "points"


@_numeric
def times(value: float) -> str:
    """A factor: 1.8 → "1.80×"."""
    return _minus(f"{value:.2f}×")


@_numeric
def seconds(value: float) -> str:
    """A duration: "320 ms", "12.4 s", "4 min 05 s", "1 h 12 min"."""
    if abs(value) < 0.9995:
        return _minus(f"{1000 * value:#.3g}".rstrip(".")) + THIN + "ms"
    if abs(value) < 99.95:
        return _minus(f"{value:#.3g}".rstrip(".")) + THIN + "s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"


@_numeric
def number(value: float) -> str:
    """Three significant digits: 0.00000123 → "1.23e−6", 0 → "0"."""
    if value == int(value) and abs(value) < 1e6:
        return _minus(f"{int(value):,}").replace(",", THIN)
    text = f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"
    mantissa, _, exponent = text.partition("e")
    return _minus(f"{mantissa}e{int(exponent)}" if exponent else text)


@_numeric
def cosine(value: float) -> str:
    """A cosine with nine decimals: what differs from 1 is what is of interest."""
    return f"{value:g}" if value in (0, 1) else _minus(f"{value:.9f}")


def anything(value: Any) -> str:
    """A setting of unknown type, in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return number(value) if not math.isfinite(value) else f"{value:.6g}"
    if isinstance(value, list | tuple) and all(isinstance(v, Real | str) for v in value):
        return ", ".join(anything(v) for v in value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
