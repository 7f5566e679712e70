"""Files that are whole or not there, the words for what a disk answers, and the lock of a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import diffcr_compile as dcr
from diffcr_compile import cli, durable
from diffcr_compile.commands.terminal import terminal
from diffcr_compile.durable import (
    atomic_write_bytes,
    disk_errors_in_words,
    free_bytes,
    passing_file,
    published,
    remove_leftovers,
)
from diffcr_compile.errors import ResourceError, UsageError
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.folder_lock import locked, take_lock
from diffcr_compile.tensor_file import _TYPES, write_tensors
from diffcr_compile.workspace import Workspace
from tests.conftest import routed_tiny_dit

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from diffcr_compile.folder_lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


# ---------------------------------------------------------------- a file is whole or not there


def test_file_and_folder_are_forced_to_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        seen.append("fsync " + Path(os.readlink(f"/proc/self/fd/{handle}")).suffix)
        real_fsync(handle)

    def replace(source: Any, target: Any) -> None:
        seen.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write_bytes(tmp_path / "a", b"x")
    assert seen == ["fsync .partial", "rename", "fsync "]  # the file, its name, the folder
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_what_cannot_fit_is_refused_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(durable, "free_bytes", lambda path: 5 << 20)
    message = r"a cannot be read or written: No space left on device \(needed 7.0 MiB, free 5.0 MiB\)"
    with (
        pytest.raises(ResourceError, match=message) as caught,
        published(tmp_path / "a", 7 << 20),
    ):
        raise AssertionError("nothing may be written")
    assert (caught.value.code, caught.value.exit_code) == ("DCR-R001", 5)
    assert "goes on where it stopped" in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_write_that_the_system_cuts_short_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a", b"old")
    with files_of_at_most(100):
        with pytest.raises(ResourceError, match=r"File too large.*free"):
            atomic_write_bytes(tmp_path / "a", b"x" * 1000)
        with pytest.raises(ResourceError, match="File too large"):
            write_tensors(tmp_path / "a", {"t": torch.zeros(1000)})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 100_000])  # met at the end, and on the way
def test_weights_and_passing_files_say_what_they_needed(size: int, tmp_path: Path) -> None:
    values = np.arange(size, dtype=np.uint8)
    weights = helper.make_tensor("w", TensorProto.UINT8, [size], values.tobytes(), raw=True)
    model = helper.make_model(helper.make_graph([], "g", [], [], [weights]))
    needed = rf"File too large \(needed {size / 1024:.1f} KiB, free"
    with files_of_at_most(5000):
        with (
            pytest.raises(ResourceError, match=f"weights.bin .*{needed}"),
            WeightsWriter(tmp_path / "weights.bin") as writer,
        ):
            writer.externalize(model)
        with (
            pytest.raises(ResourceError, match=needed),
            passing_file(tmp_path, "part.", bytes(values)),
        ):
            raise AssertionError("it is not there")
    assert os.listdir(tmp_path) == []


def test_a_passing_file_is_gone_afterwards_and_whoever_reads_it_keeps_his_errors(
    tmp_path: Path,
) -> None:
    with passing_file(tmp_path, "part.", b"whole") as file:
        assert file.read_bytes() == b"whole"
    with (
        pytest.raises(PermissionError),
        passing_file(tmp_path, "part.", b"whole"),
    ):
        raise PermissionError("not the disk's")
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_name_its_holder_is_a_lock_and_ends_without_an_error(
    tmp_path: Path,
) -> None:
    with files_of_at_most(0), locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_bytes() == b""


def test_leftovers_are_removed_with_the_next_run_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".export.partial/onnx").mkdir(parents=True)
    (tmp_path / ".export.partial/onnx/w.bin").write_bytes(b"half")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.json.x7.partial").write_bytes(b"half")
    (tmp_path / "model/partial.json").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model", "partial.json"]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("number", sorted(durable.DISK_ERRORS))
def test_every_answer_of_a_disk_is_said_in_words(number: int, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught, disk_errors_in_words(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))
    assert os.strerror(number) in caught.value.message
    assert str(tmp_path / "file") in caught.value.message
    assert re.search(r"free [\d.]+ (bytes|[KMGT]iB)", caught.value.message)


def test_a_wrong_name_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors_in_words(tmp_path):
        (tmp_path / "nothing").read_bytes()


def test_free_bytes_are_those_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    wanted = os.statvfs(tmp_path)
    found = free_bytes(tmp_path / "not/yet/there")
    assert found == pytest.approx(wanted.f_bavail * wanted.f_frsize, rel=0.1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_the_command_line_ends_with_5_whoever_met_the_disk(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(sys, "argv", ["diffcr", "show", str(tmp_path)])
    monkeypatch.setattr("diffcr_compile.commands.show.read_manifest", refuse, raising=False)
    monkeypatch.setattr("diffcr_compile.manifest.read_manifest", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 5
    said = capsys.readouterr().err
    assert "DCR-R001" in said
    assert "Traceback" not in said


def test_a_log_that_cannot_grow_ends_and_the_work_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a file that is always full")
    terminal.log_to(Path("/dev/full"))
    terminal.event("progress", done=1)
    terminal.event("progress", done=2)
    assert capsys.readouterr().err.count("The log ends here, the work goes on") == 1


# ---------------------------------------------------------------- tensors


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(list(_TYPES)),
            st.lists(st.integers(0, 3), max_size=3),
            st.booleans(),
        ),
        max_size=5,
    ),
    st.none() | st.text(max_size=9),
)
def test_tensors_are_written_as_the_library_writes_them(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: dict[str, tuple[torch.dtype, list[int], bool]],
    fact: str | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    tensors = {}
    for name, (dtype, shape, transposed) in drawn.items():
        tensor = (torch.rand(shape) * 100).to(dtype)
        tensors[name] = tensor.T if transposed and tensor.ndim == 2 else tensor
    metadata = None if fact is None else {"fact": fact}
    write_tensors(path, tensors, metadata)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert path.read_bytes() == safetensors.torch.save(whole, metadata)


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    write_tensors(tmp_path / "t", {"a": one, "b": one, "c": one[2:4]})
    found = safetensors.torch.load_file(tmp_path / "t")
    assert torch.equal(found["a"], one)
    assert torch.equal(found["b"], one)
    assert torch.equal(found["c"], one[2:4])


# ---------------------------------------------------------------- one run in a folder


def test_a_second_process_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        with pytest.raises(
            UsageError, match=rf"another diffcr run .*process {process.pid}\)"
        ) as caught:
            Workspace(tmp_path)
        assert (caught.value.code, caught.value.exit_code) == ("DCR-U017", 2)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_goes_with_its_process_however_that_ends(tmp_path: Path, ending: int) -> None:
    with _holder(tmp_path) as process:
        process.send_signal(ending)
        process.wait()
        assert (
            tmp_path / ".lock"
        ).read_text() == f"{process.pid}\n"  # the file is still there
        with Workspace(tmp_path) as space:  # and says nothing
            assert space.records == {}


def test_a_child_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        lock.close()
        take_lock(tmp_path).close()
    finally:
        child.kill()
        child.wait()


def test_of_many_that_start_at_once_one_gets_in(tmp_path: Path) -> None:
    got: list[Any] = []

    def take() -> None:
        try:
            got.append(take_lock(tmp_path))
        except UsageError:
            got.append(None)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [lock for lock in got if lock is not None]
    assert (len(got), len(held)) == (8, 1)
    held[0].close()


def test_export_locks_its_folder_too(tmp_path: Path) -> None:
    frozen = dcr.freeze(routed_tiny_dit(), keep_ratio=1.0)
    with locked(tmp_path), pytest.raises(UsageError, match="another diffcr run"):
        dcr.export(frozen, tmp_path)


def _holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock; leaving its context waits for it, so it is ended first."""

    class Ended(subprocess.Popen):  # type: ignore[type-arg]
        def __exit__(self, *caught: Any) -> None:
            self.kill()
            super().__exit__(*caught)

    process = Ended(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process
