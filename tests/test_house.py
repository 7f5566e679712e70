"""The house itself: links, packaging, make targets, documents; no model is touched."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"venv", "demo", "test", "lint", "docs", "bench", "soak", "sbom"}
EXTRAS = {"cpu", "gpu", "rtx", "diffusers", "int8", "lora", "docs", "dev"}
# packages that `make` does not install, so constraints.txt has no pin for them
UNPINNED = {"nvidia-modelopt", "onnxruntime-gpu", "tensorrt"}
# below these, "the folder above the checkout" says nothing about a person's machine
SYSTEM_FOLDERS = {"/", "/bin", "/etc", "/opt", "/srv", "/usr", "/var"}
# what finds blocks, rewrites graphs and exports them must not know a model
MODEL_FREE = [
    "capture",
    "legality",
    "streams",
    "trial",
    "residual",
    "recorded",
    "blocks",
    "block_calls",
    "trace",
    "fold",
]
# families of models; a word such as "latte" or "bria" would do as well, and the classes cover those
FAMILIES = [
    "allegro",
    "aura_?flow",
    "bria",
    "chroma",
    "cogvideo(?:x)?",
    "cogview\\d?",
    "consisid",
    "cosmos",
    "easyanimate",
    "flux\\d?",
    "helios",
    "hidream",
    "hunyuan\\w*",
    "kandinsky\\d?",
    "krea\\d?",
    "latte",
    "ltx\\d?",
    "lumina\\d?",
    "mochi",
    "omnigen",
    "pixart",
    "qwen\\w*",
    "sana",
    "sd3",
    "skyreels",
    "stable_?audio",
    "wan2?",
    "z_?image",
]


def _load_pyproject() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _requirements() -> list[Requirement]:
    project = _load_pyproject()["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [Requirement(line) for line in lines]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _check_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_docs", ROOT / "docs" / "check_docs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _text_files() -> list[Path]:
    """Files git tracks or would track; all files outside hidden folders where git is missing."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            p for p in ROOT.rglob("*") if not p.relative_to(ROOT).parts[0].startswith(".")
        ]
    return [p for p in paths if p.is_file() and not p.is_symlink() and _is_text(p)]


def _is_text(path: Path) -> bool:
    return b"\0" not in path.read_bytes()[:4096]


def _modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", ["passes", "export"])
def test_links_into_the_package_are_relative_and_resolve(name: str) -> None:
    link = ROOT / "diffcr_compile" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


@pytest.mark.parametrize("name", ["passes", "export"])
def test_linked_packages_import_under_the_one_root(name: str) -> None:
    module = importlib.import_module(f"diffcr_compile.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).samefile(ROOT / name / "__init__.py")


def test_importing_the_package_loads_no_heavy_library() -> None:
    loaded = _modules_after("import diffcr_compile")
    assert not loaded & {"torch", "onnx", "onnxruntime", "tensorrt", "diffusers"}


def test_importing_the_runtime_loads_neither_torch_nor_onnx() -> None:
    loaded = _modules_after("import diffcr_compile.runtime")
    assert not loaded & {"torch", "onnx", "onnxscript", "diffusers", "matplotlib"}


def test_package_data_is_there() -> None:
    package = resources.files("diffcr_compile")
    assert (package / "py.typed").is_file()
    templates = [entry.name for entry in (package / "report").iterdir()]
    assert any(name.endswith(".j2") for name in templates), templates
    assets = [entry.name for entry in (package / "reference" / "assets").iterdir()]
    assert any(name.endswith(".safetensors") for name in assets), assets
    assert any(name.endswith(".json") for name in assets), assets


def test_package_data_patterns_cover_every_data_file() -> None:
    patterns = _load_pyproject()["tool"]["setuptools"]["package-data"]["diffcr_compile"]
    package = ROOT / "diffcr_compile"
    covered = {path for pattern in patterns for path in package.glob(pattern)}
    data = {
        path
        for folder in (
            package / "report",
            package / "reference",
            package / "export" / "targets",
        )
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert data <= covered, sorted(str(path.relative_to(ROOT)) for path in data - covered)


def test_only_one_name_lands_in_site_packages() -> None:
    find = _load_pyproject()["tool"]["setuptools"]["packages"]["find"]
    assert find["include"] == ["diffcr_compile*"]


def test_python_range_extras_and_console_script() -> None:
    project = _load_pyproject()["project"]
    assert project["requires-python"] == ">=3.10"
    assert set(project["optional-dependencies"]) == EXTRAS
    assert project["scripts"] == {"diffcr": "diffcr_compile.__main__:run"}


def test_installed_version_is_the_projects() -> None:
    assert (
        importlib.metadata.version("diffcr-compile") == _load_pyproject()["project"]["version"]
    )


def test_requirements_are_ranges() -> None:
    pinned = [str(r) for r in _requirements() if any(s.operator == "==" for s in r.specifier)]
    assert pinned == []


def test_constraints_are_pins_without_local_versions_or_addresses() -> None:
    for constraint in _constraints():
        assert [s.operator for s in constraint.specifier] == ["=="], constraint
        assert "+" not in str(constraint.specifier), constraint
        assert constraint.url is None, constraint


def test_every_requirement_has_a_pin_in_its_range() -> None:
    pins = {_normal(c.name): next(iter(c.specifier)).version for c in _constraints()}
    for requirement in _requirements():
        name = _normal(requirement.name)
        if name in UNPINNED:
            continue
        assert name in pins, f"{requirement}: no line in constraints.txt"
        assert requirement.specifier.contains(pins[name]), (requirement, pins[name])


def test_pins_hold_in_the_environment_that_runs_the_tests() -> None:
    if not (Path(sys.prefix) / ".installed").exists():
        return  # an environment of the user's own making; the ranges apply, not the pins
    environment = default_environment()
    for constraint in _constraints():
        if constraint.marker is not None and not constraint.marker.evaluate(environment):
            continue
        try:
            installed = importlib.metadata.version(constraint.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on other platforms only
        assert constraint.specifier.contains(installed), (constraint, installed)


def test_makefile_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)) >= TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS - {"venv"}))
def test_make_sets_up_torch_by_its_pin_before_anything_else(
    target: str, tmp_path: Path
) -> None:
    installs = _installs(target, tmp_path, "HASHES=")
    assert len(installs) == 2
    assert "-c constraints.txt" in installs[0]
    assert re.search(r'"torch==\d+\.\d+\.\d+"$', installs[0])
    assert "-e " in installs[1]


def test_make_installs_by_hash_where_the_list_is_for_this_machine(tmp_path: Path) -> None:
    here = (
        platform.python_implementation(),
        sys.version_info[:2],
        sys.platform,
        platform.machine(),
    )
    is_locked = here == ("CPython", (3, 11), "linux", "x86_64")
    installs = _installs("venv", tmp_path, f"PYTHON={sys.executable}")
    hashed = [line for line in installs if "--require-hashes --no-deps" in line]
    assert len(hashed) == (3 if is_locked else 0)  # setuptools, torch, the rest
    assert not [
        line for line in _installs("venv", tmp_path, "PIP_ARGS=-v") if "hashes" in line
    ]
    for line in installs if is_locked else []:
        assert (
            line in hashed
            or "torch==" in line
            or line.endswith("--no-deps --no-build-isolation -e .")
        )


def _installs(target: str, tmp_path: Path, *arguments: str) -> list[str]:
    """The ``pip install`` lines of a dry run against an environment that does not exist yet: a fresh machine."""
    command = ["make", "-n", target, f"VENV={tmp_path / 'fresh'}", *arguments]
    # the flags of a `make test` that runs these tests are none of this one's
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment
    )
    return [line for line in done.stdout.splitlines() if "pip install" in line]


def test_ci_calls_lint_and_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make lint test" in script.read_text(encoding="utf-8")


def test_readme_opens_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:6]
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("    make")]
    assert [command.split()[1] for command in commands] == ["demo", "test"]


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_relative_links_in_documents_resolve() -> None:
    check = _check_docs()
    assert [line for path in check.markdown_files() for line in check.broken_links(path)] == []


def test_code_names_in_documents_resolve() -> None:
    check = _check_docs()
    assert [
        line for path in check.markdown_files() for line in check.unknown_names(path)
    ] == []


def test_make_targets_in_documents_exist() -> None:
    check = _check_docs()
    assert [
        line for path in check.markdown_files() for line in check.unknown_targets(path)
    ] == []


def test_made_pages_are_up_to_date() -> None:
    assert _check_docs()._made_pages() == []


def test_public_names_in_the_readme_exist() -> None:
    package = importlib.import_module("diffcr_compile")
    names = set(re.findall(r"\bdcr\.(\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert names
    assert sorted(name for name in names if not hasattr(package, name)) == []


def test_no_file_names_a_persons_machine() -> None:
    folders = {str(ROOT), str(ROOT.parent), str(Path.home())} - SYSTEM_FOLDERS
    dynamic = "|".join(re.escape(folder) for folder in sorted(folders))
    # a path starts after a blank, a quote or the like; `docs/home/x` and a URL's path are none
    start = r"(?<![\w./\-<>{}:~])"
    pattern = re.compile(rf"{start}(?:(?:{dynamic})(?![\w-])|/(?:home|Users|root)/\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in _text_files()
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        )
        if pattern.search(line)
    ]
    assert found == []


@functools.cache
def _model_classes() -> list[str]:
    """Names of all modules that diffusers' transformers define: models and their blocks."""
    folder = Path(importlib.import_module("diffusers.models.transformers").__path__[0])
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    shared = (folder.parent / "attention.py").read_text(encoding="utf-8")
    blocks = re.findall(r"^class (\w+Block)\(", shared, re.MULTILINE)
    return sorted({*re.findall(r"^class (\w+)\(", text, re.MULTILINE), *blocks})


def _named_models(text: str) -> list[str]:
    classes = re.findall(r"\b(?:" + "|".join(_model_classes()) + r")\b", text)
    # `_` joins words in code: wan_blocks names a family, swan_song and "wander" do not
    start, end = r"(?<![a-z0-9])", r"(?![a-z0-9])"
    families = re.findall(f"{start}(?:{'|'.join(FAMILIES)}){end}", text, re.IGNORECASE)
    return classes + families


def test_what_rewrites_graphs_names_no_model() -> None:
    package = ROOT / "diffcr_compile"
    files = [package / f"{name}.py" for name in MODEL_FREE]
    files += [*(ROOT / "passes").glob("*.py"), *(ROOT / "export").glob("*.py")]
    assert len(files) > len(MODEL_FREE) + 10
    found = [
        f"{path.relative_to(ROOT)}:{number}: {name}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for name in _named_models(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "# as FLUX does",
        "if type(model).__name__ == 'WanTransformer3DModel':",
        "class JointTransformerBlock",
        "wan_blocks = 3",
        "of Sana's linear attention",
        "CogVideoX",
        "the hunyuan family",
    ],
)
def test_a_model_that_is_named_is_found(text: str) -> None:
    assert _named_models(text)


@pytest.mark.parametrize(
    "text", ["we wander", "an influx", "sanatorium", "transformer_blocks.0"]
)
def test_other_words_are_no_models(text: str) -> None:
    assert _named_models(text) == []
