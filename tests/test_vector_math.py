"""The race in torch's vector maths does not reach what is built after the package is loaded."""

from __future__ import annotations

import subprocess
import sys

# The table of a sinusoidal position embedding, as the first thing that a process computes on two
# threads. Without the cure about one process in eight gets half of it with errors near 1e-9.
PROGRAM = """
import hashlib, torch
from diffcr_compile.vector_math import settle_vector_math
settle_vector_math()
torch.set_num_threads(2)
angles = torch.outer(torch.arange(256.0, dtype=torch.float64), 1 / 10000 ** torch.linspace(0, 1, 32, dtype=torch.float64))
print(hashlib.sha256(torch.sin(angles).numpy().tobytes()).hexdigest())
"""
PROCESSES = 8


def test_fresh_processes_compute_the_same_sines() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(PROCESSES)
    }
    assert len(found) == 1


def test_the_pipeline_settles_it_before_a_model_can_be_built() -> None:
    code = (
        "import diffcr_compile as dcr; dcr.compile; "
        "from diffcr_compile.vector_math import settle_vector_math as s; "
        "assert s.cache_info().currsize == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
