"""What is measured, and in which order: the most telling cases first, for a run that has little time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

TORCH = ("eager", "cuda_graph", "compile", "compile_cuda_graph")
ORT = ("ort",)
TRT = ("tensorrt", "tensorrt_rtx")
ENGINES = (*TORCH, *ORT, *TRT)
# What may be named in --only beside the engines themselves.
FAMILIES = {"torch": TORCH, "trt": TRT}
RATIOS = (0.5, 0.25, 0.75)
BATCHES = (1, 2)
# (tokens, width), the most telling first: large products gain most, small ones show what launches cost.
SIZES = ((4096, 1152), (1024, 1152), (256, 384), (4096, 384), (256, 1152), (1024, 384))
SMOKE_SIZES = ((64, 32),)
# A case is measured the later, the further it is from the most telling one; per step of each kind.
_STEP_OF_SIZE, _STEP_OF_RATIO, _SECOND_BATCH = 2, 3, 7
_LATER = {"eager": 0, "cuda_graph": 0, "ort": 0, "compile": 1, "compile_cuda_graph": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine on one model.

    Attributes:
        engine: one of ``ENGINES``.
        tokens: image tokens N.
        width: channels C.
        batch: samples in a call.
        keep_ratio: K / N of every block.
    """

    engine: str
    tokens: int
    width: int
    batch: int
    keep_ratio: float

    @property
    def key(self) -> str:
        """Name of the case in the record."""
        return f"{self.model_key}/k{self.keep_ratio:g}/{self.engine}"

    @property
    def model_key(self) -> str:
        """Equal for cases that run the same model on inputs of one shape."""
        return f"t{self.tokens}/c{self.width}/b{self.batch}"

    @property
    def family(self) -> str:
        """Engines of one family share a process."""
        return "torch" if self.engine in TORCH else "ort" if self.engine in ORT else "trt"


def chosen_engines(only: str | None) -> tuple[str, ...]:
    """Engines of a list such as ``eager,trt``; all for None.

    Raises:
        ValueError: there is no such engine.
    """
    if only is None:
        return ENGINES
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = sorted(set(names) - set(ENGINES) - set(FAMILIES))
    if unknown or not names:
        raise ValueError(
            f"no engine {', '.join(unknown)}; there are {', '.join((*ENGINES, *FAMILIES))}"
        )
    wanted = {engine for name in names for engine in FAMILIES.get(name, (name,))}
    return tuple(engine for engine in ENGINES if engine in wanted)


def all_cases(engines: Collection[str], *, smoke: bool) -> list[Case]:
    """Every case, the most telling first."""
    sizes, ratios = (SMOKE_SIZES, (0.5,)) if smoke else (SIZES, RATIOS)
    batches = (2,) if smoke else BATCHES
    found = [
        (_rank(engine, size, ratio, batch), Case(engine, *sizes[size], batch, ratios[ratio]))
        for size, ratio, batch, engine in itertools.product(
            range(len(sizes)), range(len(ratios)), batches, engines
        )
    ]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def _rank(engine: str, size: int, ratio: int, batch: int) -> tuple[int, int]:
    away = size * _STEP_OF_SIZE + ratio * _STEP_OF_RATIO + (batch - 1) * _SECOND_BATCH
    return away + _LATER.get(engine, 2), ENGINES.index(engine)
