"""Choices in the settings that decide what is built: blocks by pattern, guidance and the batch."""

from __future__ import annotations

import types
from typing import Any

import pytest

from diffcr_compile.block_choice import choose_blocks
from diffcr_compile.blocks import Refusal
from diffcr_compile.config import ExportConfig, RoutingConfig
from diffcr_compile.errors import UsageError
from diffcr_compile.guidance import Guidance, graph_batch, guidance_of
from diffcr_compile.legality import Findings


def findings(*names: str) -> Findings:
    blocks: Any = tuple(types.SimpleNamespace(name=name) for name in names)
    return Findings(blocks, (Refusal("conv_in", "it mixes neighbours"),), ())


FOUND = findings("blocks.0", "blocks.1", "blocks.10", "single.0.ff")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["blocks.0", "blocks.1", "blocks.10", "single.0.ff"]),
        ({"exclude": ["blocks.1"]}, ["blocks.0", "blocks.10", "single.0.ff"]),
        ({"exclude": [r"re:^blocks\.(0|10)$"]}, ["blocks.1", "single.0.ff"]),
        ({"include": ["re:blocks"]}, ["blocks.0", "blocks.1", "blocks.10"]),
        ({"include": ["single.0"]}, ["single.0.ff"]),  # a block stands for its parts
        ({"include": ["re:blocks"], "exclude": ["blocks.0"]}, ["blocks.1", "blocks.10"]),
        ({"exclude": ["conv_in"]}, ["blocks.0", "blocks.1", "blocks.10", "single.0.ff"]),
    ],
)
def test_blocks_are_chosen_by_name_or_pattern(settings: Any, kept: list[str]) -> None:
    chosen = choose_blocks(FOUND, RoutingConfig(**settings))
    assert [block.name for block in chosen.blocks] == kept
    left_out = {r.block: r.reason for r in chosen.refused if r.block != "conv_in"}
    assert set(left_out) == {block.name for block in FOUND.blocks} - set(kept)
    assert all("routing." in reason for reason in left_out.values())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("block.1", r"fits no block \(did you mean 'blocks.1'\?\).*candidates are blocks.0"),
        (r"re:^blcks\.10$", r"did you mean 'blocks.10'"),
        ("re:(", "no regular expression"),
        ("re:^nothing", "fits no block"),
    ],
)
@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_an_entry_that_fits_nothing_is_an_error(entry: str, words: str, setting: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        choose_blocks(FOUND, RoutingConfig(**{setting: [entry]}))
    assert error.value.code == "DCR-U054"
    assert f"routing.{setting}" in error.value.message


def runs(images: int | None) -> Any:
    return types.SimpleNamespace(images=images)


@pytest.mark.parametrize(
    ("images", "batch", "cfg", "found"),
    [
        (1, 1, None, None),
        (None, 2, None, None),  # the output does not say: nothing is known to be doubled
        (1, 2, "batched", Guidance("batched", 1, 2)),
        (2, 4, "separate", Guidance("separate", 2, 2)),
        (1, 1, "separate", Guidance("separate", 1, 1)),
        (3, 3, "none", Guidance("none", 3, 3)),
        (1, 3, "batched", Guidance("batched", 1, 3)),
        (1, 3, "separate", UsageError),
        (1, 2, None, UsageError),
        (1, 2, "none", UsageError),
        (1, 1, "batched", UsageError),
    ],
)
def test_guidance_of_a_pipeline(images: Any, batch: int, cfg: Any, found: Any) -> None:
    config = ExportConfig(cfg=cfg)
    if found is UsageError:
        with pytest.raises(UsageError) as error:
            guidance_of(runs(images), config, batch)
        assert error.value.code == "DCR-U055"
    else:
        assert guidance_of(runs(images), config, batch) == found


def test_of_a_model_the_example_has_the_batch() -> None:
    assert guidance_of(None, ExportConfig(), 4) is None
    assert guidance_of(None, ExportConfig(cfg="batched"), 4) == Guidance("batched", 2, 4)
    assert guidance_of(None, ExportConfig(cfg="separate"), 4) == Guidance("separate", 4, 4)
    with pytest.raises(UsageError):
        guidance_of(None, ExportConfig(cfg="batched"), 3)


def test_a_batch_in_the_settings_is_stronger() -> None:
    guidance = Guidance("separate", 1, 1)
    assert graph_batch(guidance, ExportConfig(cfg="separate")) == 1
    assert graph_batch(guidance, ExportConfig(cfg="separate", batch=8)) == 8
    assert graph_batch(None, ExportConfig()) is None
