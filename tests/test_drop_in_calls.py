"""Calls of the drop-in transformer: what the dense model's forward takes, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcr_compile.errors import UsageError
from diffcr_compile.manifest import read_manifest
from diffcr_compile.runtime.diffusers_adapter import CompiledDenoiser, SeveralResolutions
from tests import device_artifact as small


class Dense:
    """What an artifact's dense model is asked for: what its pipeline reads, and the signature of its forward."""

    config: Any = None
    dtype = torch.float32
    device = torch.device("cpu")

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, return_dict: bool = True
    ) -> Any: ...


class Recorder:
    """A backend that keeps what it is given.

    Args:
        folder: whose manifest it has.
        timestep: shape of the timestep in it.
    """

    def __init__(self, folder: Path, timestep: tuple[int, ...] | None = None) -> None:
        self.manifest = read_manifest(folder)
        self.calls: list[dict[str, Tensor]] = []
        if timestep is not None:
            self.manifest.inputs[1]["shape"] = list(timestep)  # type: ignore[index]

    def run_tensors(self, tensors: Any) -> tuple[Tensor, ...]:
        self.calls.append(dict(tensors))
        return (tensors["x"],)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def drop_in(folder: Path) -> CompiledDenoiser:
    return CompiledDenoiser(folder, Dense(), threads=1)


def tensors(timestep: float = 125.0) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in small.call(timestep).items()}


def test_a_call_by_position_is_the_call_by_name(drop_in: CompiledDenoiser) -> None:
    x, t, label = tensors().values()
    (found,) = drop_in(x, t, label, False)
    (named,) = drop_in(x=x, t=t, label=label, return_dict=False)
    assert torch.equal(found, named)
    expected = small.expected(small.call(125.0), 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_the_output_class_is_given_unless_a_tuple_is_asked_for(
    drop_in: CompiledDenoiser,
) -> None:
    x, t, label = tensors().values()
    assert torch.equal(drop_in(x, t, label).sample, drop_in(x, t, label, False)[0])
    assert torch.equal(drop_in(x, t, label, True).sample, drop_in(x, t, label, False)[0])


def test_a_model_without_return_dict_may_be_asked_for_a_tuple_all_the_same(
    folder: Path,
) -> None:
    class Plain(Dense):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Any: ...  # type: ignore[override]

    drop_in = CompiledDenoiser(folder, Plain(), threads=1)
    x, t, label = tensors().values()
    (found,) = drop_in(x, t, label, return_dict=False)
    assert torch.equal(drop_in(x, t, label).sample, found)


@pytest.mark.parametrize(
    ("more", "changes", "words"),
    [
        ((True, 1), {}, "too many positional arguments"),
        ((), {"t": torch.zeros(2)}, "multiple values for argument 't'"),
        ((), {"surprise": None}, "unexpected keyword argument 'surprise'"),
    ],
    ids=["too many", "twice", "unknown"],
)
def test_a_call_that_the_dense_forward_refuses_is_refused_in_words(
    drop_in: CompiledDenoiser, more: tuple[Any, ...], changes: dict[str, Any], words: str
) -> None:
    args = (*tensors().values(), *more)
    for called in (drop_in, SeveralResolutions([drop_in])):
        with pytest.raises(UsageError, match=words) as caught:
            called(*args, **changes)
        assert caught.value.code == "DCR-U020"
        assert "forward(x, t, label, return_dict)" in str(caught.value)
        assert "x float32[2, 16, 8]" in str(caught.value)


def test_a_missing_input_is_named_with_what_was_built(drop_in: CompiledDenoiser) -> None:
    with pytest.raises(UsageError, match=r"missing: \['t'\].*t float32\[2\]"):
        drop_in(x=tensors()["x"], label=tensors()["label"])


@pytest.mark.parametrize("given", [(), (1,), (1, 1)])
@pytest.mark.parametrize("built", [(), (1,), (2,), (2, 1)])
def test_one_timestep_is_that_of_the_whole_batch_whatever_axes_it_has(
    folder: Path, given: tuple[int, ...], built: tuple[int, ...]
) -> None:
    recorder = Recorder(folder, built)
    drop_in = CompiledDenoiser(recorder, Dense())
    x, _, label = tensors().values()
    drop_in(x, torch.full(given, 500.0), label)
    assert torch.equal(recorder.calls[0]["t"], torch.full(built, 500.0))
    assert drop_in.fits((x, torch.full(given, 500.0), label), {})


def test_timesteps_of_another_number_are_refused(folder: Path) -> None:
    drop_in = CompiledDenoiser(Recorder(folder, ()), Dense())
    x, t, label = tensors().values()
    with pytest.raises(UsageError, match=r"t has shape \(2,\), expected \(\)"):
        drop_in(x, t, label)


def test_a_sample_without_axes_is_refused_in_words(folder: Path) -> None:
    drop_in = CompiledDenoiser(folder, Dense(), splits_batch=True, threads=1)
    _, t, label = tensors().values()
    with pytest.raises(UsageError, match=r"x has shape \(\)"):
        drop_in(torch.tensor(0.0), t, label)


def test_lazy_minus_and_gradients_are_no_obstacle(drop_in: CompiledDenoiser) -> None:
    x, t, label = tensors().values()
    minus = torch._neg_view(x)
    assert minus.is_neg()
    (found,) = drop_in(minus, t, label, False)
    assert torch.equal(found, drop_in(-x, t, label, False)[0])
    (found,) = drop_in(x.clone().requires_grad_(), t, label, False)
    assert torch.equal(found, drop_in(x, t, label, False)[0])


def test_a_tensor_without_values_is_refused_in_words(drop_in: CompiledDenoiser) -> None:
    x, t, label = tensors().values()
    with pytest.raises(
        UsageError, match=r"x is a torch\.Tensor that numpy cannot read"
    ) as caught:
        drop_in(x.to("meta"), t, label)
    assert caught.value.code == "DCR-U021"


class Sized(Dense):
    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, height: int = 4, return_dict: bool = True
    ) -> Any: ...  # type: ignore[override]


def test_of_equal_shapes_what_is_fixed_in_the_graphs_chooses(folder: Path) -> None:
    """Packed tokens of a portrait and of a landscape have one shape, and say height and width beside it."""
    recorders = [Recorder(folder), Recorder(folder)]
    for recorder, height in zip(recorders, (4, 9), strict=True):
        recorder.manifest = dataclasses.replace(
            recorder.manifest, constants={"height": height}
        )
    several = SeveralResolutions(
        [CompiledDenoiser(recorder, Sized()) for recorder in recorders]
    )
    for height, counts in ((9, [0, 1]), (4, [1, 1])):
        several(*tensors().values(), height=height)
        assert [len(recorder.calls) for recorder in recorders] == counts
    with pytest.raises(
        UsageError, match="height is 5, but the artifact was built with 4"
    ) as caught:
        several(*tensors().values(), height=5)
    assert caught.value.code == "DCR-U023"


@pytest.mark.parametrize("change", [Tensor.bfloat16, Tensor.to_sparse])
def test_tensors_that_numpy_cannot_hold_are_told_in_words(
    drop_in: CompiledDenoiser, change: Any
) -> None:
    given = tensors()
    with pytest.raises(UsageError, match=r"label is torch.*which numpy cannot hold") as caught:
        drop_in(**{**given, "label": change(given["label"])})
    assert caught.value.code == "DCR-U021"
