"""Dense against compressed on a CUDA device, in every executor that is there: ``python -m benchmarks.gpu``."""
