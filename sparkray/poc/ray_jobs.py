"""Runs on a cluster for the entry scripts: nonces into a file, rates of all groups, servers against each other."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sparkray.config.poc import PocConfig, PocServiceConfig
from sparkray.config.poc_jobs import PocCrossCheckConfig, PocGenerateConfig, PocNonceRateConfig
from sparkray.errors import UnavailableError, WaitTimeoutError
from sparkray.poc.actors import RayFleet, start_fleet
from sparkray.poc.compare import ServerResult, cross_check
from sparkray.poc.fleet.ledger import Ledger
from sparkray.poc.fleet.messages import Run
from sparkray.poc.fleet.proof_file import ProofFile
from sparkray.poc.phases import Phase

ShowStatus = Callable[[dict[str, Any]], None]
_LOOK_SECONDS = 0.5


def run_of(config: PocConfig) -> Run:
    """The run that local settings describe; nothing is called back."""
    return Run(
        block_hash=config.block_hash,
        block_height=config.block_height,
        public_key=config.public_key,
        r_target=config.r_target,
        fraud_threshold=config.fraud_threshold,
        params=config.params,
        weights=config.weights,
        node_id=config.node_id,
        node_count=config.node_count,
    )


def generate_to_file(config: PocGenerateConfig, show: ShowStatus) -> dict[str, Any]:
    """Append valid nonces to `output`, one ProofBatch a line, until so many are computed.

    Submitted again it goes on from the cursors beside the output; each nonce is in the file once.
    """
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(output.with_name(output.name + ".ledger"))
    started = time.monotonic()
    with ProofFile(output, ledger) as proofs, _fleet(run_of(config.poc), ledger, config.fleet) as fleet:
        _wait_loaded(fleet, config.start_timeout_seconds)
        fleet.change_phase(Phase.GENERATE, config.fleet.phase_timeout_seconds)
        while fleet.controller.monitor.num_total < config.count:
            proofs.drain()
            show(_status(fleet))
            time.sleep(_LOOK_SECONDS)
        drained = fleet.stop(config.fleet.stop_timeout_seconds)
        proofs.drain()
        summary = _status(fleet)
    ledger.close()
    return {
        "output": str(output),
        "seconds": time.monotonic() - started,
        "all_recorded": drained,
        **{key: summary[key] for key in ("num_groups", "num_recorded", "num_valid", "share_z_score", "share_alarm")},
    }


def nonce_rate(config: PocNonceRateConfig, show: ShowStatus) -> dict[str, Any]:
    """Nonces a minute of every worker and of all, and how long they took to start.

    CUDA_VISIBLE_DEVICES of the job bounds the number of GPUs that are used; Ray says which.
    """
    fleet_config = _within_visible_devices(config.fleet, os.environ.get("CUDA_VISIBLE_DEVICES"))
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        started = time.monotonic()
        with _fleet(run_of(config.poc), ledger, fleet_config) as fleet:
            _wait_loaded(fleet, config.start_timeout_seconds)
            init_seconds = time.monotonic() - started
            fleet.change_phase(Phase.GENERATE, fleet_config.phase_timeout_seconds)
            time.sleep(config.warmup_seconds)
            before, begun = _computed(fleet), time.monotonic()
            while time.monotonic() - begun < config.seconds:
                time.sleep(_LOOK_SECONDS)
                show(_status(fleet))
            after, elapsed = _computed(fleet), time.monotonic() - begun
            status = _status(fleet)
        ledger.close()
    tflops = (sum(after) - sum(before)) / elapsed * config.poc.params.flop_per_nonce / 1e12
    rates = [60 * (now - then) / elapsed for now, then in zip(after, before, strict=True)]
    share = status["num_valid"] / max(1, status["num_recorded"])
    return {
        "init_seconds": init_seconds,
        "seconds": elapsed,
        "num_workers": len(rates),
        "raw_per_minute_by_worker": rates,
        "raw_per_minute": sum(rates),
        "valid_per_minute": sum(rates) * share,
        "model_tflops": tflops,
        "mfu": tflops / fleet.peak_tflops if fleet.peak_tflops else None,
        "share_z_score": status["share_z_score"],
        "share_alarm": status["share_alarm"],
    }


def check_servers(config: PocCrossCheckConfig) -> dict[str, Any]:
    """The same nonces on every node of the cluster, each on one device of its own.

    Raises:
        UnavailableError: a node failed; its words are in the message.
        WaitTimeoutError: a node did not answer in time.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(_check_server)
    refs = [
        task.options(
            max_retries=0,
            num_cpus=config.num_cpus,
            num_gpus=1 if node["Resources"].get("GPU", 0) >= 1 and config.poc.device != "cpu" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(config.poc, config.num_nonces, node["NodeManagerAddress"])
        for node in nodes
    ]
    try:
        results: list[ServerResult] = ray.get(refs, timeout=config.timeout_seconds)
    except GetTimeoutError as late:
        raise WaitTimeoutError(f"a node did not answer within {config.timeout_seconds:g} s.") from late
    except RayError as failure:
        raise UnavailableError(f"a node failed: {failure}.") from failure
    return cross_check(results, range(config.num_nonces), config.poc.r_target, config.poc.params.vocab_size)


def _check_server(config: PocConfig, num_nonces: int, server: str) -> ServerResult:
    import torch

    from sparkray.hardware.probes import read_gpus, read_memory
    from sparkray.poc.groups import device_vram, share_devices
    from sparkray.poc.local import make_engine

    started = time.perf_counter()
    engine = make_engine(config)
    init_seconds = time.perf_counter() - started
    started = time.perf_counter()
    dist = engine.distances(config.public_key, range(num_nonces))
    seconds = time.perf_counter() - started
    other = config.model_copy(update={"batch_size": max(1, engine.batch_size // 2 + 1)})
    again = make_engine(other).distances(config.public_key, range(num_nonces))
    memory = read_memory().total_bytes
    vram = [(gpu.memory_total_bytes or memory) / 2**30 for gpu in read_gpus()]
    groups = share_devices(vram, partial(device_vram, config.params, config.weights))
    on_cuda = engine.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ServerResult(
        server=server,
        device=torch.cuda.get_device_name() if on_cuda else "cpu",
        groups=tuple(group.device_ids for group in groups),
        init_seconds=init_seconds,
        raw_per_minute=60 * num_nonces / seconds,
        batch_size=engine.batch_size,
        peak_memory_gib=peak / 2**30,
        repeats_equal=bool((again == dist).all()),
        dist=tuple(dist.tolist()),
    )


@contextmanager
def _fleet(run: Run, ledger: Ledger, config: PocServiceConfig) -> Iterator[RayFleet]:
    fleet = start_fleet(run, ledger, config)
    try:
        yield fleet
    finally:
        fleet.stop(config.stop_timeout_seconds)


def _wait_loaded(fleet: RayFleet, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not fleet.controller.all_loaded:
        if time.monotonic() > deadline:
            status = _status(fleet)
            raise WaitTimeoutError(
                f"{status['num_loaded']} of {status['num_groups']} groups were loaded within {timeout_seconds:g} s;"
                f" failures: {status['last_failures'] or 'none'}.",
                hint="Ask for fewer groups, or look at `ray status` for what is missing.",
            )
        time.sleep(_LOOK_SECONDS)


def _status(fleet: RayFleet) -> dict[str, Any]:
    with fleet.locked():
        return fleet.controller.summary()


def _computed(fleet: RayFleet) -> list[int]:
    with fleet.locked():
        return [seat.cursor for seat in fleet.controller.seats]


def _within_visible_devices(config: PocServiceConfig, visible: str | None) -> PocServiceConfig:
    """At most as many groups as devices are visible; a variable that is not set changes nothing."""
    if visible is None:
        return config
    num_visible = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if not num_visible:
        return config.model_copy(update={"device": "cpu"})
    return config.model_copy(update={"num_groups": min(config.num_groups or num_visible, num_visible)})
