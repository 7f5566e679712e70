"""Distances between two sets of feature vectors, in float64: `kid` and `frechet_distance`.

Nothing here knows what the features are of; `diffcr_compile.reference.quality` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffcr_compile.errors import AccuracyError, UsageError

KERNEL_ROWS = 1024  # rows of the kernel matrix held at a time


def kid(
    features_a: Tensor,
    features_b: Tensor,
    labels_a: Tensor | None = None,
    labels_b: Tensor | None = None,
) -> float:
    """Unbiased squared MMD of two feature sets (M, d) and (N, d), cubic kernel, in float64.

    The kernel is (x.y / d + 1)^3; a sample is never compared with itself. About 0, and possibly
    below, for two samples of one distribution.

    Samples drawn with equal numbers per class are not independent: among the pairs of different
    samples too few are of one class, which pulls the plain estimate below zero by an amount that
    shrinks only as 1 / N. Give the labels of such a set, and pairs are weighed by class.

    Args:
        features_a: (M, d), M >= 2.
        features_b: (N, d), N >= 2.
        labels_a: (M,) integers, if ``features_a`` was drawn per class; at least 2 of each.
        labels_b: (N,) integers, likewise.

    Raises:
        UsageError: fewer than 2 samples, in all or of a label, or shapes that do not fit.
        AccuracyError: a feature is NaN or infinite.
    """
    a = _checked_features(features_a, "features_a")
    b = _checked_features(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise UsageError(
            f"kid: features_a has {a.shape[1]} features per sample and features_b has "
            f"{b.shape[1]}; expected equal numbers. Take both from the same network."
        )
    across = _kernel_sum(a, b) / (len(a) * len(b))
    return _within(a, labels_a, "a") + _within(b, labels_b, "b") - 2 * across


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: means (d,), covariances (d, d), in float64.

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)), where the last trace
    is taken of the similar symmetric matrix cov_a^(1/2) cov_b cov_a^(1/2).

    Raises:
        UsageError: shapes that do not fit, or a covariance that is not symmetric.
        AccuracyError: a value is NaN or infinite.
    """
    mean_a, cov_a = _checked_gaussian(mean_a, cov_a, "a")
    mean_b, cov_b = _checked_gaussian(mean_b, cov_b, "b")
    if mean_a.shape != mean_b.shape:
        raise UsageError(
            f"frechet_distance: a has {len(mean_a)} dimensions and b has {len(mean_b)}; expected "
            "equal numbers. Take both from the same network."
        )
    values, vectors = torch.linalg.eigh(cov_a)
    # rounding leaves tiny negative eigenvalues where the covariance has no full rank
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (d, d)
    product = root_a @ cov_b @ root_a
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt()
    spread = cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    # a distance; rounding alone can take it below zero
    return max(0.0, float((mean_a - mean_b).square().sum() + spread))


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d), both float64, of features (N, d).

    Raises:
        UsageError: fewer than 2 samples or another shape.
        AccuracyError: a feature is NaN or infinite.
    """
    values = _checked_features(features, "features")
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - 1)


def _within(x: Tensor, labels: Tensor | None, name: str) -> float:
    """Unbiased mean kernel of two independent draws, from (N, d) drawn with the labels fixed."""
    groups = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels.cpu()
    if groups.shape != (len(x),) or groups.is_floating_point():
        raise UsageError(
            f"kid: labels_{name} has shape {tuple(groups.shape)} and {groups.dtype}, expected "
            f"({len(x)},) integers, one per sample."
        )
    mean = _kernel_sum(x, x) / len(x) ** 2
    for label in sorted(set(groups.tolist())):
        part = x[groups == label]
        count, pairs = len(part), _kernel_sum(part, part)
        if count < 2:
            raise UsageError(
                f"kid: labels_{name} has one sample of label {label}, expected at least 2 of "
                "each. Sample more, or leave the labels out."
            )
        # a sample's kernel with itself is that of no two draws
        unbiased = (pairs - _self_kernel_sum(part)) / (count * (count - 1))
        mean += (count / len(x)) ** 2 * (unbiased - pairs / count**2)
    return mean


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    """Sum over all pairs of the cubic kernel, a few rows of the (M, N) matrix at a time."""
    width = a.shape[1]
    total = 0.0
    for part in torch.split(a, KERNEL_ROWS):
        total += float((part @ b.T / width + 1).pow(3).sum())
    return total


def _self_kernel_sum(a: Tensor) -> float:
    return float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())


def _checked_features(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(
            f"{name}: found shape {tuple(features.shape)}, expected (N, d) with N >= 2. The "
            "unbiased estimate divides by N - 1."
        )
    return _finite_double(features, name)


def _checked_gaussian(mean: Tensor, cov: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UsageError(
            f"frechet_distance: mean_{name} has shape {tuple(mean.shape)} and cov_{name} "
            f"{tuple(cov.shape)}; expected (d,) and (d, d)."
        )
    mean, cov = _finite_double(mean, f"mean_{name}"), _finite_double(cov, f"cov_{name}")
    if not torch.allclose(cov, cov.T, rtol=1e-4, atol=1e-6):
        raise UsageError(f"frechet_distance: cov_{name} is not symmetric, so no covariance.")
    return mean, cov


def _finite_double(values: Tensor, name: str) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise AccuracyError(
            f"{name}: {int((~values.isfinite()).sum())} of {values.numel()} values are NaN or "
            "infinite. Look for the images that they come from."
        )
    return values
