"""The quality metric against slow references, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from benchmarks.reference import train_features
from diffcr_compile.errors import AccuracyError, UsageError
from diffcr_compile.reference import quality
from diffcr_compile.reference.distances import KERNEL_ROWS


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def clothes(count: int, generator: torch.Generator) -> Tensor:
    """Images (count, 1, 32, 32) of one grey rectangle each on the background."""
    images = torch.full((count, 1, 32, 32), -1.0)
    corners = torch.randint(3, 12, (count, 2), generator=generator).tolist()
    sizes = torch.randint(6, 18, (count, 2), generator=generator).tolist()
    greys = (torch.rand(count, generator=generator) * 1.8 - 0.8).tolist()
    for image, (top, left), (height, width), grey in zip(
        images, corners, sizes, greys, strict=True
    ):
        image[:, top : top + height, left : left + width] = grey
    return images


def slow_kernel(x: Tensor, y: Tensor) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(x, y, strict=True))
    return (dot / len(x) + 1) ** 3


def slow_kid(a: Tensor, b: Tensor) -> float:
    within_a = [slow_kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [slow_kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    across = [slow_kernel(x, y) for x in a for y in b]
    return mean(within_a) + mean(within_b) - 2 * mean(across)


def slow_within_per_class(a: Tensor, labels: list[int]) -> float:
    """Mean kernel of two independent draws: first two classes by their shares, then a pair."""
    total = 0.0
    for first in set(labels):
        for second in set(labels):
            pairs = [
                slow_kernel(x, y)
                for i, x in enumerate(a)
                for j, y in enumerate(a)
                if i != j and labels[i] == first and labels[j] == second
            ]
            share = labels.count(first) * labels.count(second) / len(labels) ** 2
            total += share * mean(pairs)
    return total


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# kid


def test_kid_equals_a_double_loop(generator: torch.Generator) -> None:
    a = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(9, 5, generator=generator, dtype=torch.float64) + 0.3
    assert quality.kid(a, b) == pytest.approx(slow_kid(a, b), abs=1e-12)


def test_kid_per_class_equals_a_double_loop(generator: torch.Generator) -> None:
    a = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    labels_a, labels_b = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0], [5, 5, 7, 7, 7, 5, 7, 5]
    across = mean([slow_kernel(x, y) for x in a for y in b])
    expected = slow_within_per_class(a, labels_a) + slow_within_per_class(b, labels_b)
    found = quality.kid(a, b, torch.tensor(labels_a), torch.tensor(labels_b))
    assert found == pytest.approx(expected - 2 * across, abs=1e-12)


def test_kid_with_one_label_for_all_is_the_plain_kid(generator: torch.Generator) -> None:
    a, b = torch.randn(20, 3, generator=generator), torch.randn(30, 3, generator=generator)
    same = torch.zeros(20, dtype=torch.int64), torch.ones(30, dtype=torch.int64)
    assert quality.kid(a, b, *same) == pytest.approx(quality.kid(a, b), abs=1e-12)


def test_kid_is_symmetric_and_blind_to_order(generator: torch.Generator) -> None:
    a, b = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    value = quality.kid(a, b)
    assert quality.kid(b, a) == pytest.approx(value, abs=1e-12)
    assert quality.kid(a.flip(0), b) == pytest.approx(value, abs=1e-12)


def test_kid_does_not_depend_on_the_rows_held_at_a_time(generator: torch.Generator) -> None:
    a = torch.randn(KERNEL_ROWS + 7, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    m, n = len(a), len(b)
    k_aa, k_bb, k_ab = ((x @ y.T / 3 + 1).pow(3) for x, y in ((a, a), (b, b), (a, b)))
    expected = (
        (k_aa.sum() - k_aa.trace()) / (m * (m - 1))
        + (k_bb.sum() - k_bb.trace()) / (n * (n - 1))
        - 2 * k_ab.mean()
    )
    assert quality.kid(a, b) == pytest.approx(expected.item(), abs=1e-10)


def test_kid_of_one_distribution_averages_to_zero(generator: torch.Generator) -> None:
    values = [
        quality.kid(*torch.randn(2, 64, 4, generator=generator).unbind()) for _ in range(60)
    ]
    spread = torch.tensor(values).std().item() / math.sqrt(len(values))
    assert abs(mean(values)) < 4 * spread
    assert min(values) < 0 < max(values)  # unbiased, so not a distance that stops at zero


def test_kid_of_different_distributions_is_above_zero(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 200, 4, generator=generator).unbind()
    same = abs(quality.kid(a, b))
    assert quality.kid(a, b + 1.0) > 0.5
    assert quality.kid(a, b + 1.0) > 10 * same
    assert quality.kid(a, 2 * b) > 10 * same


def test_labels_take_away_the_bias_of_balanced_samples(generator: torch.Generator) -> None:
    real = quality.load_real_statistics()
    plain, per_class = [], []
    for _ in range(8):
        order = train_features.balanced_order(real.labels, generator)
        a, b = order[:200], order[200:400]
        pair = real.features[a], real.features[b]
        plain.append(quality.kid(*pair))
        per_class.append(quality.kid(*pair, real.labels[a], real.labels[b]))
    assert max(plain) < 0
    assert abs(mean(per_class)) < 0.2 * abs(mean(plain))


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (torch.zeros(1, 4), torch.zeros(3, 4), UsageError, "N >= 2"),
        (torch.zeros(3, 4), torch.zeros(0, 4), UsageError, "features_b"),
        (torch.zeros(3, 4), torch.zeros(3, 5), UsageError, "equal numbers"),
        (torch.zeros(3, 4, 1), torch.zeros(3, 4), UsageError, "features_a"),
        (torch.full((3, 4), math.nan), torch.zeros(3, 4), AccuracyError, "12 of 12"),
        (torch.zeros(3, 4), torch.full((3, 4), math.inf), AccuracyError, "features_b"),
    ],
)
def test_kid_refuses(a: Tensor, b: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quality.kid(a, b)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 0, 1]), "one sample of label 1"),
        (torch.tensor([0, 0]), "one per sample"),
        (torch.zeros(3), "integers"),
    ],
)
def test_kid_refuses_labels(labels: Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        quality.kid(torch.zeros(3, 4), torch.zeros(3, 4), labels)


# frechet_distance


def test_frechet_equals_the_closed_form_for_diagonal_covariances() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, 2.5])
    a, b = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([9.0, 1.0, 0.0])
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = quality.frechet_distance(mean_a, a.diag(), mean_b, b.diag())
    assert found == pytest.approx(expected.item(), abs=1e-10)


def test_frechet_is_unchanged_by_a_rotation_and_symmetric(generator: torch.Generator) -> None:
    a = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(50, 6, generator=generator, dtype=torch.float64) * 2 + 1
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    gaussians = quality.gaussian(a), quality.gaussian(b)
    value = quality.frechet_distance(*gaussians[0], *gaussians[1])
    assert quality.frechet_distance(*gaussians[1], *gaussians[0]) == pytest.approx(value)
    turned = quality.gaussian(a @ turn), quality.gaussian(b @ turn)
    assert quality.frechet_distance(*turned[0], *turned[1]) == pytest.approx(value)


def test_frechet_against_the_eigenvalues_of_the_product(generator: torch.Generator) -> None:
    mean_a, cov_a = quality.gaussian(torch.randn(40, 5, generator=generator))
    mean_b, cov_b = quality.gaussian(torch.randn(40, 5, generator=generator) * 3)
    # cov_a cov_b is not symmetric, but similar to a symmetric matrix: real eigenvalues >= 0
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    found = quality.frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert found == pytest.approx((expected - 2 * root_trace).item(), abs=1e-9)


def test_frechet_of_equal_gaussians_is_zero_even_without_full_rank() -> None:
    features = torch.arange(12.0).reshape(4, 3)  # rank 1
    mean_, cov = quality.gaussian(features)
    assert quality.frechet_distance(mean_, cov, mean_, cov) == pytest.approx(0, abs=1e-6)


def test_gaussian_equals_torch_cov(generator: torch.Generator) -> None:
    features = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    mean_, cov = quality.gaussian(features)
    torch.testing.assert_close(mean_, features.mean(0))
    torch.testing.assert_close(cov, features.T.cov())


@pytest.mark.parametrize(
    ("mean_b", "cov_b", "error", "words"),
    [
        (torch.zeros(3), torch.eye(2), UsageError, r"\(d, d\)"),
        (torch.zeros(3), torch.eye(3), UsageError, "2 dimensions"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), UsageError, "symmetric"),
        (torch.tensor([0.0, math.nan]), torch.eye(2), AccuracyError, "mean_b"),
    ],
)
def test_frechet_refuses(
    mean_b: Tensor, cov_b: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quality.frechet_distance(torch.zeros(2), torch.eye(2), mean_b, cov_b)


# psnr_db


def test_psnr_by_hand() -> None:
    a = torch.full((2, 1, 2, 2), -1.0)
    b = a.clone()
    b[0, 0, 0, 0] = -0.8  # one of eight pixels is off by 0.2, so the MSE is 0.04 / 8 = 0.005
    assert quality.psnr_db(a, b) == pytest.approx(10 * math.log10(4 / 0.005), abs=1e-4)


def test_psnr_of_equal_images_is_infinite_and_of_opposite_ones_zero() -> None:
    black = torch.full((1, 1, 4, 4), -1.0)
    half = black.clone()
    half[..., :2] = 1.0
    assert quality.psnr_db(half, half) == math.inf
    assert quality.psnr_db(half, half.flip(3)) == pytest.approx(0)


def test_psnr_clamps_first() -> None:
    a = torch.full((1, 1, 2, 2), -1.0)
    assert quality.psnr_db(a, a - 0.5) == math.inf


def test_psnr_refuses_other_shapes() -> None:
    with pytest.raises(UsageError, match="shapes"):
        quality.psnr_db(torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    with pytest.raises(UsageError, match="not empty"):
        quality.psnr_db(torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2))


# score and quality_report


def test_noise_raises_kid_and_frechet_step_by_step(generator: torch.Generator) -> None:
    clean, _ = quality.extract(clothes(150, generator))
    others = clothes(150, generator)
    noise = torch.randn(others.shape, generator=generator)
    kids, distances = [], []
    for strength in (0.0, 0.05, 0.1, 0.2, 0.4):
        features, _ = quality.extract(others + strength * noise)
        kids.append(quality.kid(clean, features))
        distances.append(
            quality.frechet_distance(*quality.gaussian(clean), *quality.gaussian(features))
        )
    assert kids == sorted(kids)
    assert distances == sorted(distances)
    assert kids[-1] > 10 * abs(kids[0])


def test_score_is_made_of_its_parts(generator: torch.Generator) -> None:
    images, labels = clothes(40, generator), torch.arange(40) % 10
    features, predicted = quality.extract(images)
    real = quality.load_real_statistics()
    found = quality.score(images, labels)
    expected_kid = 1000 * quality.kid(features, real.features, labels, real.labels)
    gaussians = *quality.gaussian(features), real.mean, real.cov
    assert found == {
        "num_samples": 40,
        "kid_x1000": pytest.approx(expected_kid, rel=1e-6),
        "frechet": pytest.approx(quality.frechet_distance(*gaussians), rel=1e-6),
        "class_accuracy": pytest.approx((predicted == labels).float().mean().item()),
    }


def test_extract_does_not_depend_on_batch_or_overshoot(generator: torch.Generator) -> None:
    images = clothes(quality.BATCH + 3, generator)
    features, predicted = quality.extract(images)
    assert features.shape == (len(images), 128)
    assert predicted.shape == (len(images),)
    torch.testing.assert_close(quality.extract(images[-5:])[0], features[-5:])
    overshot = torch.where(images == -1, images - 0.3, images)
    torch.testing.assert_close(quality.extract(overshot)[0], features)


def test_quality_report_has_the_keys_of_the_report(generator: torch.Generator) -> None:
    dense, labels = clothes(30, generator), torch.arange(30) % 10
    compressed = dense + 0.3 * torch.randn(dense.shape, generator=generator)
    found = quality.quality_report(dense, compressed, labels)
    assert found["metric"] == "KID x 1000 (Fashion-MNIST features)"
    assert found["num_samples"] == 30
    assert found["dense"] == pytest.approx(quality.score(dense, labels)["kid_x1000"])
    assert found["compressed"] == pytest.approx(quality.score(compressed, labels)["kid_x1000"])
    assert set(found["frechet"]) == {"dense", "compressed", "floor"}
    assert set(found["class_accuracy"]) == {"dense", "compressed"}
    assert found["psnr_to_dense_db"] == pytest.approx(quality.psnr_db(dense, compressed))
    assert found["floor"] == quality.load_real_statistics().floor(30)["kid_x1000"]
    assert found["conditions"]["kid_estimate"] == "per class"
    assert "FID" not in json.dumps(found, allow_nan=False)


def test_quality_report_of_equal_sets_is_valid_json(generator: torch.Generator) -> None:
    images, labels = clothes(12, generator), torch.arange(12) % 10
    found = quality.quality_report(images, images, labels)
    assert found["psnr_to_dense_db"] is None
    assert found["dense"] == found["compressed"]
    assert found["conditions"]["kid_estimate"] == "plain"  # classes 2 to 9 have one sample
    json.dumps(found, allow_nan=False)


def _good() -> Tensor:
    return torch.full((4, 1, 32, 32), -1.0)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.full((4, 32, 32), -1.0), UsageError, r"expected \(N, 1, 32, 32\)"),
        (torch.full((4, 1, 28, 28), -1.0), UsageError, r"\(4, 1, 28, 28\)"),
        (torch.full((4, 3, 32, 32), -1.0), UsageError, "reference DiT"),
        (_good()[:1], UsageError, "at least 2"),
        (_good() + 1.5, UsageError, r"\[0.5, 0.5\], expected \[-1, 1\]"),
        (_good() * 128, UsageError, r"x / 127.5 - 1"),
        (_good() * math.nan, AccuracyError, "NaN"),
        (_good() * math.inf, AccuracyError, "infinite"),
    ],
)
def test_images_refused(images: Tensor, error: type[Exception], words: str) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(error, match=words):
        quality.score(images, labels)
    with pytest.raises(error, match="dense_images"):
        quality.quality_report(images, images, labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), r"expected \(4,\)"),
        (torch.zeros(4), "integers"),
        (torch.tensor([0, 1, 2, 10]), "null label"),
        (torch.tensor([0, 1, 2, -1]), r"\[-1, 2\]"),
    ],
)
def test_labels_refused(labels: Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        quality.score(_good(), labels)


def test_quality_report_refuses_sets_of_different_size() -> None:
    with pytest.raises(UsageError, match="4 dense and 3 compressed"):
        quality.quality_report(_good(), _good()[:3], torch.zeros(4, dtype=torch.int64))
