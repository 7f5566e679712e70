"""Keep what torch's tracers say about themselves from the user, who gets one error in words."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

# They warn about the exporter's own affairs, or print a whole graph before the error that says why.
_TALKATIVE = (
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
    "torch.fx.experimental.symbolic_shapes",
)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """No warnings, prints and log lines of torch while the context lasts; loggers that are set to say more still do."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    loggers = [one for one in loggers if one.getEffectiveLevel() >= logging.WARNING]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
