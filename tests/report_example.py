"""A realistic report dict for the tests: 8 blocks, 4 timestep buckets, every section filled."""

from __future__ import annotations

import math
from typing import Any

TOKENS, WIDTH, BUCKETS, ASKED = 256, 128, 4, 0.6
SCHEDULE = [
    [256, 256, 208, 176], [240, 208, 176, 144], [208, 176, 144, 112], [176, 128, 112, 64],
    [160, 112, 64, 0], [176, 144, 112, 96], [224, 192, 160, 112], [256, 240, 224, 176],
]  # fmt: skip
OUTER = 1_400_000


def block_macs(kept: int) -> int:
    """Projections and feed-forward are linear in K, QK and AV quadratic."""
    return 12 * kept * WIDTH * WIDTH + 2 * kept * kept * WIDTH


def example_report() -> dict[str, Any]:
    schedule = {f"transformer_blocks.{i}": row for i, row in enumerate(SCHEDULE)}
    per_block = {
        name: {
            "dense": block_macs(TOKENS),
            "kept": [block_macs(k) for k in row],
            "routing": [0 if k in (0, TOKENS) else TOKENS * WIDTH for k in row],
            "moved_bytes": [0 if k in (0, TOKENS) else 3 * k * WIDTH * 4 for k in row],
        }
        for name, row in schedule.items()
    }
    dense = OUTER + 8 * block_macs(TOKENS)
    spent = sum(sum(b["kept"]) + sum(b["routing"]) for b in per_block.values())
    mean = OUTER + round(spent / BUCKETS)
    reached = mean / dense
    return {
        "schema_version": 1,
        "created": "2026-01-15T09:30:00+00:00",
        "title": "Reference DiT compressed to 60 % of its MACs",
        "model": {
            "name": "reference-dit-fashion-mnist",
            "parameters": 2_812_000,
            "num_tokens": TOKENS,
            "routed_blocks": 8,
            "refused_blocks": [
                {"block": "pos_embed.proj", "reason": "a convolution mixes neighbouring tokens"}
            ],
        },
        "verdict": "pass",
        "checks": [
            {"name": name, "passed": True, "found": found, "expected": expected}
            for name, found, expected in (
                ("budget", f"{reached:.4f} of dense MACs", "0.594 to 0.600"),
                ("routed, all kept", "bit-equal", "bit-equal"),
                ("ONNX parity", "max abs 2.4e-6", "at most 1e-4"),
                ("ONNX size", "1.013 × dense", "at most 1.05 ×"),
            )
        ],
        "budget": {"metric": "macs", "asked": ASKED, "reached": reached},
        "speedup": {
            "macs_implied": 1 / reached,
            "onnxruntime_cpu_loop": 1.8123,
            "conditions": {
                "steps": 20, "batch": 4, "repeats": 5, "threads": 2,
                "dense_seconds": [4.12, 4.05, 4.31, 4.08, 4.10],
                "compressed_seconds": [2.27, 2.25, 2.36, 2.24, 2.30],
            },
        },
        "parity": {
            "routed_all_kept_bit_equal": True,
            "onnx_max_abs": 2.4e-6,
            "onnx_rel_l2": 3.1e-7,
            "ladder": [
                _rung("dense -> ROUTED, all tokens kept", None, 0.0, 0.0),
                *(_rung("ROUTED -> FROZEN", b, 0.0, 0.0) for b in range(BUCKETS)),
                *(_rung("FROZEN -> ONNX Runtime", b, 2.4e-6 - b * 1e-7, 1e-4) for b in range(BUCKETS)),
            ],
        },
        "size": {"onnx_bytes": 11_584_921, "dense_onnx_bytes": 11_436_800, "weights_bytes": 11_250_304},
        "quality": {
            "metric": "KID x 1000 (Fashion-MNIST features)",
            "num_samples": 256,
            "dense": 4.213,
            "compressed": 5.871,
            "psnr_to_dense_db": 19.42,
            "class_accuracy": {"dense": 0.8711, "compressed": 0.8594},
            "conditions": {"sampler": "Euler", "steps": 20, "guidance": 1.0, "seeds": [0, 1, 2], "ema": True},
        },
        "schedule": schedule,
        "timestep_buckets": [[0, 250], [250, 500], [500, 750], [750, 1000]],
        "noisiest_first": [3, 2, 1, 0],
        "num_tokens": dict.fromkeys(schedule, TOKENS),
        "macs": {"dense": dense, "compressed_mean": mean, "outer": OUTER, "per_block": per_block},
        "calibration": {
            "history": [_step(i) for i in range(0, 600, 2)],
            "settings": {"seed": 0, "steps": 600, "learning_rate": 3e-4, "estimator": "boundary", "gate": "straight_through"},
        },
        "seconds": {
            "capture": 1.92, "route": 0.31, "calibrate": 312.4, "freeze": 0.042, "export": 14.8,
            "validate": 9.71, "benchmark": 33.0, "quality": 71.5,
        },
        "peak_rss_bytes": {"capture": 512 << 20, "calibrate": 1340 << 20, "export": 890 << 20},
        "environment": {
            "python": "3.11.7", "torch": "2.13.0+cpu", "onnx": "1.23.2", "onnxruntime": "1.31.0",
            "machine": "x86_64, 2 cores",
        },
        "commands": ["diffcr demo -o out --budget 60% --seed 0", "diffcr report out"],
        "warnings": ["Quality was measured with 256 samples; its spread over seeds is about 0.4."],
        "pictures": {"samples_dense": "samples_dense.png", "samples_compressed": "samples_compressed.png"},
    }  # fmt: skip


def _rung(step: str, bucket: int | None, error: float, tolerance: float) -> dict[str, Any]:
    return {
        "step": step, "bucket": bucket, "max_abs": error, "rel_l2": error / 8,
        "cosine": 1.0 if error == 0 else 0.999999987, "non_finite": 0, "tolerance": tolerance,
        "passed": True,
    }  # fmt: skip


def _step(step: int) -> dict[str, float]:
    ramp = min(1.0, step / 300)
    asked = 1 - (1 - ASKED) * ramp
    wave = math.sin(step * 1.7) + math.sin(step * 0.61)
    return {
        "step": step,
        "loss": 0.02 + 0.11 * math.exp(-step / 120) + 0.03 * ramp + 0.004 * wave,
        "budget": asked,
        "mean_keep_ratio": 1 - 0.42 * ramp + 0.004 * wave,
        "reached": asked - 0.004 + 0.003 * wave,
        "seconds": step * 0.52,
    }
