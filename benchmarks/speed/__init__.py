"""What the benchmarks of speed and size share: models, timing, memory, records."""
