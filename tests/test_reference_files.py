"""The files that the quality metric ships with, and the scripts that make the reference files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.reference import make_model_card, train_features
from diffcr_compile.errors import ArtifactError
from diffcr_compile.reference import quality
from diffcr_compile.reference.model import new_reference_dit

MAX_ASSET_BYTES = 2_000_000


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Let a test load other files than the shipped ones, and leave nothing of it behind."""
    loaders = (quality.load_feature_net, quality.load_real_statistics)
    for loader in loaders:
        loader.cache_clear()
    yield
    for loader in loaders:
        loader.cache_clear()


def test_assets_are_small() -> None:
    files = [quality.ASSETS / quality.NET_FILE, quality.ASSETS / quality.REAL_FILE]
    assert sum(path.stat().st_size for path in files) <= MAX_ASSET_BYTES


def test_real_statistics_are_what_they_claim() -> None:
    real = quality.load_real_statistics()
    assert real.features.shape == (2500, 128)
    assert real.labels.bincount().tolist() == [250] * 10
    assert real.info["test_images"] == "10000"
    assert {"seed", "torch", "python", "made_by", "data"} <= set(real.info)
    # a quarter of the images has nearly the statistics of all
    mean_, cov = quality.gaussian(real.features)
    assert quality.frechet_distance(mean_, cov, real.mean, real.cov) < 0.1


def test_the_class_head_agrees_with_the_stored_features_and_accuracy() -> None:
    real = quality.load_real_statistics()
    predicted = quality.load_feature_net().head(real.features).argmax(1)
    accuracy = (predicted == real.labels).float().mean().item()
    stated = float(real.info["test_accuracy"])
    assert stated >= 0.89
    assert accuracy == pytest.approx(stated, abs=0.02)


def test_floors_are_near_zero_and_chosen_by_sample_count() -> None:
    real = quality.load_real_statistics()
    counts = [entry["num_samples"] for entry in real.floors]
    assert counts == sorted(counts)
    assert real.floor(1) == real.floors[0]
    assert real.floor(10**6) == real.floors[-1]
    assert real.floor(480)["num_samples"] == 500
    for entry in real.floors:
        assert abs(entry["kid_x1000"]) < 1
        assert 0 < entry["kid_x1000_spread"] < 4
    distances = [entry["frechet"] for entry in real.floors]
    assert distances == sorted(distances, reverse=True)  # biased upwards for few samples


def test_feature_net_is_frozen_and_in_evaluation_mode() -> None:
    net = quality.load_feature_net()
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == 185_362


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize("load", [quality.load_feature_net, quality.load_real_statistics])
def test_missing_broken_and_foreign_files_are_refused(
    load: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "ASSETS", tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        load()
    for name in (quality.NET_FILE, quality.REAL_FILE):
        (tmp_path / name).write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match="no readable safetensors"):
        load()
    for name in (quality.NET_FILE, quality.REAL_FILE):
        save_file({"other": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ArtifactError, match="Restore the file"):
        load()


# the scripts that make the files


def test_training_learns_and_writes_files_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_caches: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1280) % 10
    images = torch.full((len(labels), 1, 32, 32), -1.0)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 3 : 6 + 2 * label, 8:24] = 0.5  # ten heights, told apart in a few steps
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    monkeypatch.setattr(train_features, "BATCH", 64)
    monkeypatch.setattr(train_features, "REAL_PER_CLASS", 20)
    monkeypatch.setattr(train_features, "FLOOR_SAMPLES", (100, 200))
    monkeypatch.setattr(quality, "ASSETS", tmp_path)

    net = train_features.train(images, labels, epochs=3, seed=0)
    train_features.write_assets(net, images, labels, tmp_path, {"seed": "0"})

    real = quality.load_real_statistics()
    assert real.labels.bincount().tolist() == [20] * 10
    assert float(real.info["test_accuracy"]) > 0.5
    assert [entry["num_samples"] for entry in real.floors] == [100, 200]
    features, _ = train_features.features_and_accuracy(net, images, labels)
    torch.testing.assert_close(quality.extract(images)[0], features)


def test_balanced_order_holds_each_class_once_in_every_ten() -> None:
    labels = torch.cat([torch.arange(10).repeat(5), torch.zeros(7, dtype=torch.int64)])
    order = train_features.balanced_order(labels, torch.Generator().manual_seed(0))
    assert len(order.unique()) == len(order) == 50
    assert all(labels[run].tolist() == list(range(10)) for run in order.split(10))


def test_model_card_states_what_was_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {name: value.half() for name, value in new_reference_dit().state_dict().items()}
    save_file(weights, tmp_path / "dit.safetensors", metadata={"seed": "7"})
    entries = [(0, 16, 100, 0.5), (0, 16, 200, 0.3), (1, 32, 100, 0.2), (1, 32, 100, 0.125)]
    records = [
        {
            "stage": stage,
            "image_size": size,
            "step": step,
            "train_loss": loss,
            "held_out_loss_ema": loss,
            "images_per_second": 90.0,
        }
        for stage, size, step, loss in entries
    ]
    log = tmp_path / "training_log.jsonl"
    log.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    out = tmp_path / "out"

    facts = make_model_card.write_card(
        tmp_path / "dit.safetensors", log, out, samples=20, steps=1, seed=0
    )

    assert make_model_card.total_steps(facts.records) == [100, 200, 300]
    text = (out / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert facts.sha256 in text
    assert "Seed 7." in text
    assert "| 32 x 32 | 100 | 0.1250 | 90 |" in text  # the later of two lines for one step
    assert f"| {facts.quality['kid_x1000']:.2f} |" in text
    assert json.loads((out / "dit_config.json").read_text())["num_layers"] == 8
    for name in ("samples.png", "loss_curve.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_model_card_refuses_an_unbalanced_number_of_samples(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="multiple of 10"):
        make_model_card.write_card(tmp_path, tmp_path, tmp_path, samples=25, steps=1, seed=0)
