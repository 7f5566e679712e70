"""Quality at equal MACs on the reference DiT: ours, the paper's recipe, and the cheap tricks."""
