"""Stands in for cuda-python where there is no GPU."""
