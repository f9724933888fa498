"""A cached folder is made once, is whole or absent, and is made again when a hash disagrees."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from sparkray.errors import UnavailableError, WaitTimeoutError
from sparkray.models.cache import MANIFEST, cache_root, damage_of, ensure_folder, file_sha256


class Builder:
    """Fills a folder with two files and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "a.bin").write_bytes(b"alpha")
        (folder / "b.bin").write_bytes(b"beta")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(b"abc")
    return path


def test_sha256_is_the_published_digest_of_abc(source: Path) -> None:
    assert file_sha256(source) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_is_built_once_with_its_manifest(tmp_path: Path, source: Path) -> None:
    build, target = Builder(), tmp_path / "cache" / "model"
    assert ensure_folder(target, source, build) == target
    assert ensure_folder(target, source, build) == target
    assert build.calls == 1
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["files"] == {
        "a.bin": hashlib.sha256(b"alpha").hexdigest(),
        "b.bin": hashlib.sha256(b"beta").hexdigest(),
    }


def _change_a_byte(target: Path) -> str:
    (target / "a.bin").write_bytes(b"alphb")
    return "a.bin has changed"


def _remove_a_file(target: Path) -> str:
    (target / "b.bin").unlink()
    return "b.bin is missing"


def _remove_the_manifest(target: Path) -> str:
    (target / MANIFEST).unlink()
    return "not prepared"


def _cut_the_manifest(target: Path) -> str:
    text = (target / MANIFEST).read_text()
    (target / MANIFEST).write_text(text[: len(text) // 2])
    return f"{MANIFEST} cannot be read"


@pytest.mark.parametrize("harm", [_change_a_byte, _remove_a_file, _remove_the_manifest, _cut_the_manifest])
def test_a_damaged_folder_is_named_and_made_again(tmp_path: Path, source: Path, harm) -> None:  # noqa: ANN001
    build, target = Builder(), tmp_path / "cache" / "model"
    ensure_folder(target, source, build)
    expected = harm(target)
    assert (damage_of(target) or "").startswith(expected)
    ensure_folder(target, source, build)
    assert build.calls == 2
    assert damage_of(target) is None
    assert (target / "a.bin").read_bytes() == b"alpha"
    assert sorted(path.name for path in target.parent.iterdir()) == ["model", "model.lock"]


def test_another_source_makes_another_folder(tmp_path: Path, source: Path) -> None:
    build, target = Builder(), tmp_path / "cache" / "model"
    ensure_folder(target, source, build)
    source.write_bytes(b"abd")
    ensure_folder(target, source, build)
    assert build.calls == 2


def test_a_failing_build_leaves_nothing_that_looks_made(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "cache" / "model"

    def full_disk(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"al")
        raise OSError(28, "No space left on device")

    with pytest.raises(UnavailableError, match=r"No space left on device.*SPARKRAY_CACHE"):
        ensure_folder(target, source, full_disk)
    assert not target.exists()
    assert ensure_folder(target, source, Builder()) == target


_DIE_MIDWAY = """
import sys, time
from pathlib import Path
from sparkray.models.cache import ensure_folder

def build(folder):
    (folder / "a.bin").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)

ensure_folder(Path(sys.argv[1]), Path(sys.argv[2]), build)
"""


def test_a_process_killed_midway_leaves_no_half_made_folder(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "cache" / "model"
    command = [sys.executable, "-c", _DIE_MIDWAY, str(target), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    build = Builder()
    ensure_folder(target, source, build, lock_timeout_seconds=10)
    assert build.calls == 1
    assert (target / "a.bin").read_bytes() == b"alpha"
    assert sorted(path.name for path in target.parent.iterdir()) == ["model", "model.lock"]


_BUILD_SLOWLY = """
import os, sys, time
from pathlib import Path
from sparkray.models.cache import ensure_folder

def build(folder):
    time.sleep(0.5)
    (folder / "a.bin").write_bytes(b"alpha")
    with open(sys.argv[3], "a") as log:
        log.write("built\\n")

ensure_folder(Path(sys.argv[1]), Path(sys.argv[2]), build)
"""


def test_of_processes_that_start_together_one_builds(tmp_path: Path, source: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", _BUILD_SLOWLY, str(tmp_path / "cache" / "model"), str(source), str(log)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert log.read_text() == "built\n"


def test_a_lock_that_is_not_free_in_time_is_an_error(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "model"
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "model.lock"):
            held.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    try:
        with pytest.raises(WaitTimeoutError, match=r"model\.lock for 0\.05 s"):
            ensure_folder(target, source, Builder(), lock_timeout_seconds=0.05)
    finally:
        done.set()
        holder.join()


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRAY_CACHE", str(tmp_path / "chosen"))
    assert cache_root() == tmp_path / "chosen"
    monkeypatch.delenv("SPARKRAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "sparkray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "sparkray"


def test_a_cache_that_is_a_file_is_an_error_with_a_mend(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnavailableError, match="cannot be written"):
        ensure_folder(tmp_path / "file" / "model", source, Builder())
