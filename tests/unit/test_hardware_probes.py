"""Reading a machine: driver text, container limits, ports, and memory that the driver does not report."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import psutil
import pytest

from sparkray.hardware import CpuDevice, CudaDevice, GpuReading, MachineReading, MemoryReading, UnifiedDevice, probes
from sparkray.hardware import identify_devices as identify

GIB = 2**30
MACHINE_128 = MemoryReading(total_bytes=120 * GIB, available_bytes=101 * GIB, free_bytes=60 * GIB)


def test_a_gpu_with_its_own_memory() -> None:
    (gpu,) = probes.parse_gpus("NVIDIA H100 80GB HBM3, 81559, 80000, 580.95.05, 9.0\n")
    assert gpu == GpuReading("NVIDIA H100 80GB HBM3", 81559 * 2**20, 80000 * 2**20, "580.95.05", "9.0")
    reading = MachineReading("Linux", "x86_64", "3.11.7", 16, MACHINE_128, gpus=(gpu,))
    assert identify(reading) == (
        CudaDevice("NVIDIA H100 80GB HBM3", "9.0", 81559 * 2**20, 80000 * 2**20),
        CpuDevice("x86_64", 16, 120 * GIB, 101 * GIB),
    )


@pytest.mark.parametrize("said", ["[N/A]", "[Not Supported]", "Not Supported", "N/A"])
def test_a_gb10_does_not_report_its_memory_and_gets_the_machines(said: str) -> None:
    gpus = probes.parse_gpus(f"NVIDIA GB10, {said}, {said}, 580.95.05, 12.1\n")
    assert gpus == (GpuReading("NVIDIA GB10", None, None, "580.95.05", "12.1"),)
    reading = MachineReading("Linux", "aarch64", "3.11.7", 20, MACHINE_128, gpus=gpus)
    # What is available, with the page cache that gives way, and not what is free.
    assert identify(reading)[0] == UnifiedDevice("NVIDIA GB10", "12.1", 120 * GIB, 101 * GIB)


def test_a_mac_has_one_memory() -> None:
    reading = MachineReading("Darwin", "arm64", "3.11.7", 16, MACHINE_128)
    assert identify(reading)[0] == UnifiedDevice("Apple silicon", None, 120 * GIB, 101 * GIB)


@pytest.mark.parametrize("text", ["", "\n", "No devices were found\n"])
def test_no_gpu(text: str) -> None:
    assert probes.parse_gpus(text) == ()


def _install_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1'")
    assert [gpu.name for gpu in probes.read_gpus()] == ["NVIDIA GB10"]


@pytest.mark.parametrize("script", ["echo 'has failed'; exit 9", "exec sleep 30"])
def test_a_driver_that_fails_or_hangs_means_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    _install_nvidia_smi(tmp_path, monkeypatch, script)
    monkeypatch.setattr(probes, "NVIDIA_SMI_TIMEOUT_SECONDS", 0.2)
    assert probes.read_gpus() == ()


def test_without_a_container_memory_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    memory = probes.read_memory(tmp_path)
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_a_containers_limit_is_the_memory(tmp_path: Path) -> None:
    mib = 2**20
    (tmp_path / "memory.max").write_text(f"{100 * mib}\n")
    (tmp_path / "memory.current").write_text(f"{70 * mib}\n")
    (tmp_path / "memory.stat").write_text(f"anon {50 * mib}\ninactive_file {15 * mib}\n")
    assert probes.read_memory(tmp_path) == MemoryReading(100 * mib, 45 * mib, 30 * mib)


@pytest.mark.parametrize(("quota", "num_cores"), [("100000 100000", 1), ("50000 100000", 1)])
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, quota: str, num_cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert probes.read_num_cores(tmp_path) == num_cores
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert probes.read_num_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_names_who_listens(address: str) -> None:
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen()
        port = server.getsockname()[1]
        reading = probes.read_port(port, "test")
        assert not reading.free
        assert reading.owner is not None
        assert f"(pid {os.getpid()})" in reading.owner
    assert probes.read_port(port, "test").free


def test_versions_come_from_metadata() -> None:
    found = probes.read_versions(["pytest", "no-such-distribution"])
    assert found == {"pytest": pytest.__version__}


def test_a_disk_is_named_once_and_a_missing_folder_stands_for_its_parent(tmp_path: Path) -> None:
    (disk,) = probes.read_disks([tmp_path / "not" / "there", tmp_path])
    assert disk.folder == str(tmp_path)
    assert 0 <= disk.free_bytes < disk.total_bytes


def test_ray_auth_is_read_from_variables_and_files(tmp_path: Path) -> None:
    assert probes.read_ray_auth({}, tmp_path) == probes.RayAuthReading()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    reading = probes.read_ray_auth({"RAY_AUTH_MODE": "TOKEN", "RAY_AUTH_TOKEN_PATH": "/no/file"}, tmp_path)
    assert (reading.mode, reading.token_path_exists, reading.default_token_exists) == ("token", False, True)
