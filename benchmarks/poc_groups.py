"""Many groups on one machine: does every one make progress, is any nonce in two of them, how fast do all follow.

    python benchmarks/poc_groups.py --json

Starts a Ray head of its own with logical CPUs, 48 groups of a tiny model as 48 actors, lets them generate, and
changes the phase again and again. Memory is about 0.15 GB a group beyond what processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparkray.cluster.processes import free_port
from sparkray.cluster.session import Session, end_session, start_session
from sparkray.config.cluster import ClusterConfig
from sparkray.config.poc import TINY, PocServiceConfig, WeightsConfig
from sparkray.poc.fleet.ledger import Ledger, read_cursors
from sparkray.poc.fleet.messages import Run
from sparkray.poc.fleet.runner import FleetRunner
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.phases import Phase

# Above 2 every nonce is valid, so what was generated can be compared nonce by nonce.
RUN = Run("0x00", 1, "0x00", 5.0, 0.01, TINY, WeightsConfig(), node_id=0, node_count=1, url="http://unused")
WAIT_SECONDS = 900.0


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Wait, or end with what was waited for."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {WAIT_SECONDS:g} s for {what}")
        time.sleep(0.2)


def measure(fleet: FleetRunner, rounds: int) -> dict[str, Any]:
    """Load, generate until all have moved, then change phases."""
    controller = fleet.controller
    started = time.monotonic()
    wait_for("all groups to load", lambda: controller.all_loaded)
    load_seconds = time.monotonic() - started
    seconds = []
    for number in range(rounds):
        for phase in (Phase.GENERATE, Phase.VALIDATE, Phase.GENERATE, Phase.IDLE):
            barrier = fleet.change_phase(phase, WAIT_SECONDS)
            assert barrier.opened_at is not None
            seconds.append(barrier.opened_at - barrier.ordered_at)
            if phase is Phase.GENERATE:
                before = [seat.cursor for seat in controller.seats]
                wait_for(
                    f"progress of all in round {number}",
                    lambda before=before: all(
                        seat.cursor > old for seat, old in zip(controller.seats, before, strict=True)
                    ),
                )
    return {
        "load_seconds": load_seconds,
        "num_phase_changes": len(seconds),
        "median_ack_seconds": statistics.median(seconds),
        "max_ack_seconds": max(seconds),
        "num_restarts": controller.summary()["num_restarts"],
    }


def compare(ledger: Ledger, path: Path) -> dict[str, Any]:
    """What the outbox holds against what the cursors say."""
    bodies = [json.loads(delivery.body) for delivery in ledger.due(time.time(), 1_000_000)]
    received = [nonce for body in bodies for nonce in body["nonces"]]
    cursors = read_cursors(path)
    done = {nonce for _, group, groups, cursor in cursors for nonce in NonceIterator(0, 1, group, groups).take(cursor)}
    return {
        "num_nonces": len(received),
        "num_twice": len(received) - len(set(received)),
        "num_lost": len(done - set(received)),
        "num_unknown": len(set(received) - done),
        "smallest_cursor": min(cursor for *_, cursor in cursors),
    }


def run(num_groups: int, rounds: int, session: Session, folder: Path) -> dict[str, Any]:
    """Everything on a cluster of this session."""
    # Ray looks at its environment when it is imported, so not before it says where the session is.
    import ray

    from sparkray.poc.actors import start_fleet

    ray.init(address=session.address, logging_level="ERROR", log_to_driver=False)
    path = folder / "ledger.sqlite"
    ledger = Ledger(path)
    config = PocServiceConfig(
        device="cpu", num_groups=num_groups, batch_size=4, num_prep_threads=1, prep_depth=2, max_unsent=1_000_000
    )
    fleet = start_fleet(RUN, ledger, config)
    result = measure(fleet, rounds)
    result["all_recorded"] = fleet.stop(WAIT_SECONDS)
    result.update(compare(ledger, path))
    ray.shutdown()
    ledger.close()
    return result


def main() -> None:
    """Run, and print one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cluster = ClusterConfig(
            num_cpus=arguments.groups + 2, object_store_gib=0.1, dashboard=False, dashboard_port=free_port()
        )
        session = start_session(cluster, name=f"poc-groups-{free_port()}")
        try:
            os.environ.update(session.environment())
            result = run(arguments.groups, arguments.rounds, session, Path(folder))
        finally:
            end_session(session)
    result = {"num_groups": arguments.groups, **result}
    if not arguments.json:
        for key, value in result.items():
            print(f"{key}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
