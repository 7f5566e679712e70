"""The drop-in transformer: the pipeline's own image, over ONNX Runtime and over torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import diffcr_compile as dcr
from diffcr_compile.calibrate.pipelines import open_pipeline
from diffcr_compile.errors import ArtifactError, UsageError
from tests import models, pipelines

STEPS = 4
# Values are in [0, 1]. ONNX Runtime sums in another order than torch; over four steps and the decoder of
# random weights that comes to less than a fifth of the step between two grey values, 1/255.
SAME_IMAGE = 8e-4
GUIDANCE = {
    "dit": {"on": {"guidance_scale": 4.0}, "off": {"guidance_scale": 1.0}},
    "pixart": {"on": {"guidance_scale": 4.5}, "off": {"guidance_scale": 1.0}},
}
TWO_BUCKETS = {("dit", "on"), ("pixart", "off")}


class Built(NamedTuple):
    pipe: Any
    inputs: dict[str, Any]
    frozen: tuple[nn.Module, ...]
    folder: Path


def wake(model: nn.Module) -> None:
    """Larger random weights: freshly built ones change so little that nothing would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))


def two_buckets(routed: Any, edge: float) -> dcr.TokenSchedule:
    """Half of the tokens below the edge, three quarters above it, all in the last block."""
    specs = routed.program.blocks
    kept = {s.name: (s.num_tokens // 2, s.num_tokens * 3 // 4) for s in specs}
    kept[specs[-1].name] = (specs[-1].num_tokens,) * 2
    return dcr.TokenSchedule(
        kept,
        {s.name: s.num_tokens for s in specs},
        dcr.TimestepBuckets((0.0, edge, 1000.0), (0.5, 0.5)),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Built]:
    made: dict[tuple[str, str], Built] = {}

    def get(name: str, guidance: str) -> Built:
        if (name, guidance) not in made:
            torch.manual_seed(0)
            pipe, inputs = pipelines.PIPELINES[name]()
            wake(pipe.transformer)
            inputs = {**inputs, **GUIDANCE[name][guidance], "num_inference_steps": STEPS}
            routed = dcr.route(open_pipeline(pipe, inputs))
            if (name, guidance) in TWO_BUCKETS:
                frozen = dcr.freeze(routed, schedule=two_buckets(routed, 500.0))
            else:
                frozen = dcr.freeze(routed, keep_ratio=0.5) * 2
            folder = tmp_path_factory.mktemp(f"{name}_{guidance}")
            dcr.export(frozen[: len(set(frozen))], folder)
            made[name, guidance] = Built(pipe, inputs, frozen, folder)
        return made[name, guidance]

    return get


class FrozenInPlace(nn.Module):
    """The reference: FROZEN graphs in the transformer's place, chosen by hand."""

    def __init__(self, frozen: tuple[nn.Module, ...], dense: Any) -> None:
        super().__init__()
        self.low, self.high = frozen
        self.config, self.dtype, self.device = dense.config, dense.dtype, dense.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graph = self.low if float(kwargs["timestep"].flatten()[0]) <= 500 else self.high
        return graph(*args, **kwargs)


def image(built: Built, transformer: Any, **more: Any) -> Any:
    """What a user sees: the decoded picture, values in [0, 1]."""
    pipe = copy.copy(built.pipe)
    pipe.scheduler = copy.deepcopy(built.pipe.scheduler)
    pipe.transformer = transformer  # as the documents say it
    pipe.set_progress_bar_config(disable=True)
    call = {
        **built.inputs,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(3),
        **more,
    }
    with torch.no_grad():
        return np.asarray(pipe(**call).images)


@pytest.mark.parametrize("guidance", ["on", "off"])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_the_image_is_that_of_the_frozen_model(
    name: str, guidance: str, built: Callable[[str, str], Built]
) -> None:
    case = built(name, guidance)
    dense = case.pipe.transformer
    expected = image(case, FrozenInPlace(case.frozen, dense))
    drop_in = dcr.DiffusersTransformer.from_artifact(case.folder)
    found = image(case, drop_in)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < SAME_IMAGE
    # The test would pass on anything if the pictures were flat, or the dense ones.
    assert expected.std() > 0.02
    assert np.abs(image(case, dense) - expected).max() > 10 * SAME_IMAGE


@pytest.mark.parametrize(("name", "guidance"), [("dit", "on"), ("pixart", "off")])
def test_over_torch_the_graphs_are_made_again_from_folder_and_dense_model(
    name: str, guidance: str, built: Callable[[str, str], Built]
) -> None:
    case = built(name, guidance)
    dense = case.pipe.transformer
    drop_in = dcr.DiffusersTransformer.from_artifact(case.folder, backend="torch", model=dense)
    expected = image(case, FrozenInPlace(case.frozen, dense))
    assert np.array_equal(image(case, drop_in), expected)


def test_built_separately_both_halves_of_a_guided_call_run_and_so_does_an_unguided_one(
    built: Callable[[str, str], Built],
) -> None:
    case = built("pixart", "off")  # batch 1
    dense = case.pipe.transformer
    drop_in = dcr.DiffusersTransformer(case.folder, dense, splits_batch=True)
    frozen = FrozenInPlace(case.frozen, dense)  # in torch the batch is free
    for scale in (4.5, 1.0):
        expected = image(case, frozen, guidance_scale=scale)
        found = image(case, drop_in, guidance_scale=scale)
        assert np.abs(found - expected).max() < SAME_IMAGE
    with pytest.raises(UsageError, match=r"batch 1, and twice that in two halves"):
        image(case, drop_in, num_images_per_prompt=3)


def test_it_has_the_dense_models_face(built: Callable[[str, str], Built]) -> None:
    case = built("pixart", "on")
    dense = case.pipe.transformer
    drop_in = dcr.DiffusersTransformer.from_artifact(case.folder)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dense.config.items()}
    public = {k: v for k, v in plain.items() if not k.startswith("_")}
    assert {k: v for k, v in drop_in.config.items() if not k.startswith("_")} == public
    assert drop_in.config["_class_name"] == type(dense).__name__
    assert drop_in.config.sample_size == dense.config.sample_size
    assert (drop_in.dtype, drop_in.device) == (dense.dtype, dense.device)
    call = {**open_pipeline(case.pipe, case.inputs).example, "return_dict": True}
    with torch.no_grad():
        assert type(drop_in(**call)) is type(dense(**call))
    found = drop_in(**{**call, "return_dict": False})
    assert isinstance(found, tuple)
    assert torch.equal(found[0], drop_in(**call).sample)


def test_callbacks_of_the_pipeline_see_every_step(built: Callable[[str, str], Built]) -> None:
    case = built("pixart", "off")
    drop_in = dcr.DiffusersTransformer.from_artifact(case.folder)
    seen: list[int] = []
    image(case, drop_in, callback=lambda step, *_: seen.append(step), callback_steps=1)
    assert seen == list(range(STEPS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 64, "width": 64}, r"this resolution was not built.*batch 2, samples of 4 x 16 x 16"),
        ({"guidance_scale": 1.0}, r"this batch was not built.*built for batch 2"),
        (
            {
                key: torch.zeros(1, 9, 12) if key.endswith("embeds") else torch.ones(1, 9).long()
                for key in (
                    "prompt_embeds", "negative_prompt_embeds",
                    "prompt_attention_mask", "negative_prompt_attention_mask",
                )
            },
            r"this sequence length was not built.*encoder_hidden_states float32\[2, 5, 12\]",
        ),
    ],
    ids=["resolution", "batch", "sequence"],
)  # fmt: skip
def test_what_was_not_built_is_refused_with_what_was(
    change: dict[str, Any], words: str, built: Callable[[str, str], Built]
) -> None:
    case = built("pixart", "on")
    drop_in = dcr.DiffusersTransformer.from_artifact(case.folder)
    with pytest.raises(UsageError, match=words) as error:
        image(case, drop_in, **change)
    assert error.value.code == "DCR-U021"


def test_other_weights_are_not_taken_for_the_model_that_was_compiled(
    built: Callable[[str, str], Built],
) -> None:
    case = built("dit", "on")
    other = copy.deepcopy(case.pipe.transformer)
    with torch.no_grad():
        other.transformer_blocks[0].ff.net[2].weight.mul_(1.1)
    with pytest.raises(UsageError, match=r"was not compiled from this DiT.*golden") as error:
        dcr.DiffusersTransformer.from_artifact(case.folder, backend="torch", model=other)
    assert error.value.code == "DCR-U051"
    with pytest.raises(UsageError, match="provider, threads: of ONNX Runtime"):
        dcr.DiffusersTransformer.from_artifact(
            case.folder, backend="torch", model=other, provider="cuda", threads=1
        )


def test_a_model_that_is_not_of_diffusers_is_asked_for(tmp_path: Path) -> None:
    model, inputs = models.plain()
    dcr.export(dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5), tmp_path)
    for options in ({}, {"backend": "torch"}):
        with pytest.raises(UsageError, match=r"model=") as error:
            dcr.DiffusersTransformer.from_artifact(tmp_path, **options)
        assert error.value.code == "DCR-U052"
    (tmp_path / "model/recipe.json").unlink()
    with pytest.raises(ArtifactError, match="CompiledDenoiser") as missing:
        dcr.DiffusersTransformer.from_artifact(tmp_path)
    assert missing.value.code == "DCR-A014"
