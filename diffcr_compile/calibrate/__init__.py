"""Learn routers and keep ratios: teacher states, ratios under a budget, one training loop."""

from __future__ import annotations

from diffcr_compile.callable_package import make_callable

make_callable(__name__)
