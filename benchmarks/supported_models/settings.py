"""Steps, tolerances and places."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks/results/supported_models.json"
DOCUMENT = ROOT / "docs/supported_models.md"
KEEP_RATIO = 0.5
# Relative L2. fp32 rounding through a few blocks stays below 1e-5; one wrong token is 1e-2.
PARITY = 1e-4
ONNX_PARITY = 1e-3
# Of a block's change to its stream, in float64; blocks that compute in fp32 inside reach 1e-6.
PERMUTATION = 1e-4
# Closer scores than this at the border between kept and bypassed may fall either way in fp32.
NEAR_TIE = 1e-5
STEPS = ("captured", "routed", "all_kept", "parity", "permutation", "onnx", "rtx")
