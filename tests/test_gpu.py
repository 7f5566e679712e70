"""What only a CUDA device can show; run with ``pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import diffcr_compile as dcr
from tests import models
from tests.conftest import equal, flat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_cuda(name: str) -> models.Example:
    model, inputs = getattr(models, f"tiny_{name}")()
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return model.cuda(), moved


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_all_kept_is_bit_equal_on_cuda(name: str) -> None:
    model, inputs = on_cuda(name)
    routed = dcr.route(model, inputs)
    with torch.no_grad():
        assert equal(routed(**inputs), model(**inputs))


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_frozen_on_cuda_is_frozen_on_the_cpu(name: str) -> None:
    model, inputs = on_cuda(name)
    (found,) = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    cpu_model, cpu_inputs = getattr(models, f"tiny_{name}")()
    (expected,) = dcr.freeze(dcr.route(cpu_model, cpu_inputs), keep_ratio=0.5)
    with torch.no_grad():
        for a, b in zip(flat(found(**inputs)), flat(expected(**cpu_inputs)), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)  # other kernels, fp32


def test_runner_on_the_cuda_provider(tmp_path: Path) -> None:
    model, inputs = models.tiny_dit()
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    artifact = dcr.export(frozen, tmp_path / "out")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    cuda, cpu = artifact.load(provider="cuda"), artifact.load()
    np.testing.assert_allclose(cuda(**arrays), cpu(**arrays), rtol=1e-3, atol=1e-3)
