"""The reference model sampled by numpy and ONNX Runtime, in a process that cannot import torch.

The reference is the FROZEN graphs in torch, sampled by an Euler loop that is written here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffcr_compile as dcr
from diffcr_compile.reference.demo import example_inputs, load_reference_dit

STEPS, BATCH = 4, 2
BLOCKED = (
    "torch",
    "onnx",
    "onnxscript",
    "diffusers",
    "pydantic",
    "safetensors",
    "rich",
    "typer",
)
SAMPLE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is blocked in this test")

sys.meta_path.insert(0, Blocker())
import numpy as np
from diffcr_compile import runtime

runner = runtime.load({artifact!r}, threads=1)
noise, labels = np.load({noise!r}), np.load({labels!r})

def velocity(x, t):
    times = np.full(len(x), t, np.float32)
    return runner(hidden_states=x, timestep=times, class_labels=labels)

np.save({images!r}, runtime.euler_flow(velocity, noise, {steps}))
assert not set({blocked}) & set(sys.modules)
"""


@pytest.fixture(scope="module")
def frozen() -> Sequence[nn.Module]:
    """Two timestep buckets of the reference model, with other kept tokens in each."""
    routed = dcr.route(load_reference_dit(), example_inputs(BATCH))
    program = routed.program
    names = {spec.name: spec.num_tokens for spec in program.blocks}
    kept = dict.fromkeys(names, (128, 192))
    buckets = dcr.TimestepBuckets((0.0, 500.0, 1000.0), (0.5, 0.5))
    return tuple(dcr.freeze(routed, schedule=dcr.TokenSchedule(kept, names, buckets)))


def sampled_by_torch(
    frozen: Sequence[nn.Module], noise: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    x = torch.from_numpy(noise)
    for step in range(STEPS):
        t = 1000 * (1 - step / STEPS)
        model = frozen[0] if t <= 500 else frozen[1]
        with torch.no_grad():
            output = model(
                hidden_states=x,
                timestep=torch.full((BATCH,), t),
                class_labels=torch.from_numpy(labels),
            )
        velocity = (
            output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        )
        x = x - velocity / STEPS
    return x.numpy()


def test_numpy_and_onnxruntime_give_the_images_that_torch_gives(
    frozen: Sequence[nn.Module], tmp_path: Path
) -> None:
    dcr.export(frozen, tmp_path / "out")
    generator = np.random.default_rng(3)
    noise = generator.standard_normal((BATCH, 1, 32, 32)).astype(np.float32)
    labels = np.array([4, 9])
    paths = {name: str(tmp_path / f"{name}.npy") for name in ("noise", "labels", "images")}
    np.save(paths["noise"], noise)
    np.save(paths["labels"], labels)
    code = SAMPLE.format(
        artifact=str(tmp_path / "out"), steps=STEPS, blocked=set(BLOCKED), **paths
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, wanted = np.load(paths["images"]), sampled_by_torch(frozen, noise, labels)
    assert wanted.std() > 0.1
    # Pixels in [-1, 1]; sums are taken in another order. A wrong bucket is off by 0.02 and more, see below.
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    swapped = sampled_by_torch(tuple(reversed(frozen)), noise, labels)
    assert np.abs(swapped - wanted).max() > 0.02
