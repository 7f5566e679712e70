"""ONNX Runtime sessions, and words for what goes wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffcr_compile.errors import (
    ArtifactError,
    EnvironmentMissingError,
    UnsupportedModelError,
    UsageError,
)

Provider = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# On CUDA ONNX Runtime rounds the operands of float32 products to TF32 unless told not to. What a graph
# has in float32 is meant so: the golden outputs are, and a graph that should be faster has float16.
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


def check_provider(provider: str) -> str:
    """ONNX Runtime's name of a provider.

    Raises:
        UsageError: there is no such provider.
        EnvironmentMissingError: the installed ONNX Runtime does not have it.
    """
    if provider not in _PROVIDERS:
        raise UsageError(f"provider must be one of {sorted(_PROVIDERS)}, got {provider!r}")
    name = _PROVIDERS[provider]
    available = _onnxruntime().get_available_providers()
    if name not in available:
        raise EnvironmentMissingError(
            f"this ONNX Runtime has no {name}, only {available}. For a GPU: pip uninstall "
            "onnxruntime, then pip install 'diffcr-compile[gpu]' (the two do not live together).",
            code="DCR-E001",
        )
    return name


def make_session(
    path: Path, provider: str = "cpu", threads: int | None = None, *, prepack: bool = True
) -> Any:
    """An ``onnxruntime.InferenceSession`` that runs where it was told to.

    Args:
        path: the ONNX file.
        provider: ``cpu`` or ``cuda``.
        threads: threads inside an operator, at least 1; None for ONNX Runtime's default.
        prepack: copy weights into the layout that kernels like, which pays from the second run on.

    Raises:
        UsageError: bad `provider` or `threads`.
        EnvironmentMissingError: the provider is not there. ONNX Runtime itself would go on
            silently on the CPU.
        ArtifactError: ONNX Runtime cannot read the file.
        UnsupportedModelError: it has no kernel for one of the file's operators in the operator's type.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    name = check_provider(provider)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; make the artifact anew (diffcr compile)")
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: what it warns about is fallback, checked below
    if threads is not None:
        options.intra_op_num_threads = threads
    # Every session has threads of its own, which spin for a while after a run. With a session per
    # timestep bucket those of the last bucket would take the cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    wanted = [(n, _OPTIONS.get(n, {})) for n in dict.fromkeys([name, _PROVIDERS["cpu"]])]
    try:
        session = ort.InferenceSession(os.fspath(path), options, providers=wanted)
    except Exception as error:
        if type(error).__name__ == "NotImplemented":
            raise UnsupportedModelError(
                f"ONNX Runtime {ort.__version__} has no kernel on {name} for an operator of {path} in its type: "
                f"{str(error)[:400]}. float64 and bfloat16 have few kernels. Convert the model and its example inputs "
                "with .to(torch.float32) and compile anew, or build an engine of the graph."
            ) from error
        raise ArtifactError(
            f"ONNX Runtime {ort.__version__} cannot load {path}: {str(error)[:400]}. "
            "Make the artifact anew, or install the onnxruntime named in its manifest."
        ) from error
    found = session.get_providers()
    if name not in found:
        raise EnvironmentMissingError(
            f"ONNX Runtime could not start {name} and fell back to {found}. Check the GPU driver, "
            "CUDA and cuDNN of this machine, or ask for provider='cpu'.",
            code="DCR-E001",
        )
    return session


def run_session(session: Any, arrays: Mapping[str, Any], what: str) -> list[Any]:
    """Outputs of a session, in graph order.

    Args:
        session: made by :func:`make_session`.
        arrays: its inputs.
        what: is run, for the message.

    Raises:
        UsageError: an input has a value that the graph cannot take, such as a row that a table lacks.
    """
    try:
        outputs: list[Any] = session.run(None, dict(arrays))
    except Exception as error:
        # names and types were checked before, so what is left are values
        if type(error).__name__ != "InvalidArgument":
            raise
        raise UsageError(
            f"ONNX Runtime cannot run {what} with these values: {' '.join(str(error).split())[:400]}. Give indices, such "
            "as class labels, that the model has, and try again.",
            code="DCR-U058",
        ) from error
    return outputs


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentMissingError(
            "onnxruntime is not installed: pip install 'diffcr-compile[cpu]', or [gpu]"
        ) from error
    return onnxruntime
