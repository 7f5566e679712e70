"""Where bfloat16 saves time in training, and where it costs it."""

from __future__ import annotations

import torch


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are fast there. A CPU without instructions for them takes tens of times as long."""
    if torch.device(device).type != "cpu":
        return True
    with_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return with_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
