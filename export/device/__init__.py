"""Engines: built by TensorRT or trtexec, compared with the golden outputs, described by a sidecar.

What is here needs numpy and TensorRT only, so that it goes on a device inside ``diffcr_runtime.pyz``.
"""
