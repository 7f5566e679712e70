"""Learn routers and keep ratios: teacher states, ratios under a budget, one training loop."""
