"""Nothing that comes as data is run: a walk over the sources, and hostile files that are tried."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_compile as dcr
from diffcr_compile import cli
from diffcr_compile.drop_in import DiffusersTransformer
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.export.device.script import device_script
from diffcr_compile.manifest import read_manifest, verify_artifact
from diffcr_compile.recipe import RECIPE_FILE
from diffcr_compile.runtime.diffusers_adapter import class_of_diffusers
from diffcr_compile.sources import load_case
from tests import device_artifact, offline
from tests.test_corrupted_inputs import rehashed
from tests.test_engine_build import Shell

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("diffcr_compile", "export", "passes")
FOLDERS = (*PRODUCT, "benchmarks", "docs", "tests")
# they read or write objects with code in them
OBJECT_STORES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
}
NETWORK = {
    "socket",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "requests",
    "httpx",
    "aiohttp",
    "urllib3",
    "socketserver",
}
# where the name of a module is no literal, and who chooses it
CHOSEN_NAMES = {
    "diffcr_compile/__init__.py": "a table of our own",
    "diffcr_compile/device_doctor.py": "a table of our own",
    "diffcr_compile/runtime/cuda_api.py": "a table of our own",
    "diffcr_compile/runtime/device.py": "a table of our own",
    "diffcr_compile/runtime/diffusers_adapter.py": "checked: diffusers only, test below",
    "diffcr_compile/sources.py": "the user, who writes python:<module>:<factory>",
}
SUFFIXES = {
    "", ".py", ".md", ".json", ".jsonl", ".cpp", ".yaml", ".yml", ".toml", ".txt", ".typed", ".j2", ".png", ".safetensors",
}  # fmt: skip
BOMB = "!!python/object/apply:os.system ['touch pwned']"


def sources(folders: tuple[str, ...]) -> Iterator[tuple[str, ast.AST]]:
    """Path and every node of every Python file."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_symlink():
                name = path.relative_to(ROOT).as_posix()
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    yield name, node


def calls(folders: tuple[str, ...]) -> Iterator[tuple[str, str, ast.Call]]:
    """File:line, dotted name of the callee, and the call."""
    for name, node in sources(folders):
        if isinstance(node, ast.Call):
            yield f"{name}:{node.lineno}", ast.unparse(node.func), node


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def argument(call: ast.Call, name: str) -> Any:
    """The literal value of a keyword; None if it is not there."""
    found = next((k.value for k in call.keywords if k.arg == name), None)
    return None if found is None else getattr(found, "value", "no literal")


# ---------------------------------------------------------------- the walk


def test_nothing_imports_what_stores_objects() -> None:
    found = [
        f"{name}:{node.lineno} {module}"  # type: ignore[attr-defined]
        for name, node in sources(FOLDERS)
        for module in imported(node)
        if module.partition(".")[0] in OBJECT_STORES
    ]
    assert found == []


def test_the_product_imports_no_network() -> None:
    found = [
        f"{name} {module}"
        for name, node in sources(PRODUCT)
        for module in imported(node)
        if module.partition(".")[0] in NETWORK
    ]
    assert found == []


def test_tensors_and_yaml_are_read_as_data() -> None:
    wrong = []
    for where, callee, call in calls(FOLDERS):
        last = callee.rpartition(".")[2]
        if callee in ("torch.load",) and argument(call, "weights_only") is not True:
            wrong.append(f"{where} {callee} without weights_only=True")
        if callee.startswith("yaml.") and last in (
            "load",
            "load_all",
            "unsafe_load",
            "full_load",
        ):
            wrong.append(f"{where} {callee}")
        if argument(call, "allow_pickle") not in (None, False):
            wrong.append(f"{where} allow_pickle")
        if argument(call, "trust_remote_code") not in (None, False):
            wrong.append(f"{where} trust_remote_code")
    assert wrong == []


def test_the_product_writes_no_pickle_and_evaluates_no_text() -> None:
    forbidden = {"torch.save", "torch.load", "eval", "exec", "compile", "__import__", "os.system", "os.popen",
                 "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}  # fmt: skip
    found = [f"{where} {callee}" for where, callee, _ in calls(PRODUCT) if callee in forbidden]
    assert found == []


def test_no_process_gets_a_shell() -> None:
    wrong = []
    for where, callee, call in calls(FOLDERS):
        if argument(call, "shell") not in (None, False) or callee in ("os.system", "os.popen"):
            wrong.append(where)
        if (
            callee.startswith("subprocess.")
            and call.args
            and isinstance(call.args[0], ast.Constant)
        ):
            wrong.append(f"{where} one string")
    assert wrong == []


def test_models_are_read_from_disk_only() -> None:
    product = [c for c in calls(PRODUCT) if c[1].endswith(".from_pretrained")]
    assert len(product) == 2
    for where, _, call in product:
        assert any(
            k.arg is None and ast.unparse(k.value) == "ONLY_DATA" for k in call.keywords
        ), where


def test_a_module_is_imported_by_a_chosen_name_only_where_it_is_known_who_chooses() -> None:
    found = {
        where.partition(":")[0]
        for where, callee, call in calls(PRODUCT)
        if callee == "importlib.import_module" and not isinstance(call.args[0], ast.Constant)
    }
    assert found == set(CHOSEN_NAMES)


def test_templates_escape_everything() -> None:
    made = [
        call for _, callee, call in calls(PRODUCT) if callee.endswith("jinja2.Environment")
    ]
    assert len(made) == 1
    assert argument(made[0], "autoescape") is True
    assert not [
        w for w, callee, _ in calls(PRODUCT) if callee.rpartition(".")[2] == "Template"
    ]
    for path in (ROOT / "diffcr_compile").rglob("*.j2"):
        text = path.read_text(encoding="utf-8")
        assert "autoescape false" not in text
        assert "|safe" not in text.replace(" ", "")


def test_every_file_has_a_type_that_holds_no_code_but_ours() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    if not paths:
        pytest.skip("no git here")
    assert {
        path.suffix for path in paths if path.name not in (".gitignore", "run")
    } <= SUFFIXES
    for path in paths:
        if (ROOT / path).is_file():
            with (ROOT / path).open("rb") as file:
                head = file.read(4)
            assert head[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK"), path


# ---------------------------------------------------------------- the network


def test_tests_cannot_reach_the_network() -> None:
    with pytest.raises(offline.NetworkError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(offline.NetworkError):
        socket.getaddrinfo("example.org", 443)
    with (
        pytest.raises(offline.NetworkError),
        socket.socket(type=socket.SOCK_DGRAM) as datagram,
    ):
        datagram.sendto(b"x", ("192.0.2.1", 53))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_machine_itself_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


# ---------------------------------------------------------------- hostile files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diffcr", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile", "demo", "-o", "out", "--config", "bomb.yaml"),
        ("compile", "demo", "-o", "out", "--set", f"calibration.steps={BOMB}"),
        ("inspect", "diffusers:pipe", "--pipeline-inputs", "bomb.yaml"),
        ("lint", "artifact", "--target", "bomb.yaml"),
        ("freeze", "begun"),
        ("diff", "begun", "begun"),
    ],
    ids=lambda a: a[0],
)
def test_a_yaml_file_with_code_in_it_is_refused_and_not_run(
    arguments: tuple[str, ...],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "bomb.yaml").write_text(f"calibration: {BOMB}\n")
    (here / "pipe").mkdir()
    (here / "pipe/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    device_artifact.write(here / "artifact")
    shutil.copytree(here / "artifact", here / "begun")
    (here / "begun/effective_config.yaml").write_text(f"run: {BOMB}\n")
    status = run(monkeypatch, *arguments)
    assert status in (2, 7)
    assert "DCR-" in capsys.readouterr().err
    assert not (here / "pwned").exists()


class Bomb(nn.Module):
    """Whoever unpickles it makes a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_pickled_weights_are_not_read(here: Path) -> None:
    from tests.models import tiny_dit

    tiny_dit()[0].save_pretrained("model")  # type: ignore[operator]
    assert load_case("diffusers:model", _inputs(here)).name.startswith("DiT")
    Path("model/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, "model/diffusion_pytorch_model.bin")
    with pytest.raises(UsageError):
        load_case("diffusers:model", _inputs(here))
    assert not Path("pwned").exists()


def test_code_beside_a_model_is_not_run(here: Path) -> None:
    from tests.models import tiny_dit

    tiny_dit()[0].save_pretrained("model")  # type: ignore[operator]
    config = json.loads(Path("model/config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/evil.py").write_text("import os\nos.system('touch pwned')\nclass Evil: pass\n")
    with pytest.raises(UsageError):
        load_case("diffusers:model", _inputs(here))
    assert not Path("pwned").exists()


def _inputs(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"hidden_states": torch.zeros(1, 1, 16, 16)}, folder / "inputs.safetensors")
    return folder / "inputs.safetensors"


@pytest.mark.parametrize(
    "name",
    ["evil.Evil", "os.system", "subprocess.Popen", "diffusers.utils.logging.os.system", "diffusers",
     "torch.nn.Module", "diffusers.DDIMScheduler", "diffusers..x", "\uff44iffusers.x.Y"],
)  # fmt: skip
def test_code_that_an_artifact_names_is_not_imported(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "evil.py").write_text("open('pwned', 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(here))
    with pytest.raises(ArtifactError) as caught:
        class_of_diffusers(name, "BaseOutput")
    assert caught.value.code == "DCR-A015"
    assert not (here / "pwned").exists()


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("model_class", "evil.Evil", "DCR-U052"),
        ("model_class", "diffusers.DDIMScheduler", "DCR-A015"),
        ("model_class", "diffusers.models.evil.Evil", "DCR-A015"),
        ("dtype", "load", "DCR-A002"),
        ("learned", "../../secret.safetensors", "DCR-A002"),
        ("learned", "/etc/passwd", "DCR-A002"),
    ],
)
def test_a_hostile_recipe_under_hashes_that_fit_is_refused(
    key: str, value: str, code: str, here: Path
) -> None:
    from tests.models import tiny_dit

    model, inputs = tiny_dit()
    artifact = here / "artifact"
    dcr.export(dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5), artifact)
    recipe = json.loads((artifact / RECIPE_FILE).read_text())
    (artifact / RECIPE_FILE).write_text(json.dumps({**recipe, key: value}))
    rehashed(artifact)
    with pytest.raises((ArtifactError, UsageError)) as caught:
        DiffusersTransformer.from_artifact(artifact)
    assert caught.value.code == code


# ---------------------------------------------------------------- the script that runs on a device


def test_a_file_name_cannot_leave_the_list_of_hashes_in_the_script(here: Path) -> None:
    artifact = device_artifact.write(here / "artifact")
    (artifact / "onnx/x\nSUMS\ntouch pwned\n").write_bytes(b"")
    rehashed(artifact)
    with pytest.raises(ArtifactError, match="not a plain path") as caught:
        verify_artifact(artifact, read_manifest(artifact))
    assert caught.value.code == "DCR-A006"


@pytest.mark.parametrize(
    "evil", ["k'; touch pwned; '", "$(touch pwned)", "`touch pwned`", "k\ntouch pwned\n", "-h"]
)
def test_names_of_inputs_are_quoted_in_the_script(evil: str, here: Path) -> None:
    artifact = device_artifact.write(here / "artifact; touch pwned")
    data = json.loads((artifact / "manifest.json").read_text())
    data["profile_graphs"][0]["kept_inputs"] = {evil: "a"}
    data.pop("checksum")
    manifest = type(read_manifest(artifact))(**data)
    (artifact / "build_on_device.sh").write_text(
        device_script(manifest, "profiles", _settings())
    )
    done = Shell(here, artifact).run()
    assert done.returncode == 0, done.stderr
    assert f"{evil}:" in (here / "record/calls").read_text()
    assert not list(here.rglob("pwned"))


def _settings() -> Any:
    from diffcr_compile.export.device.job import BuildSettings

    return BuildSettings()
