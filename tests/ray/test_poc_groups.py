"""Groups as actors on the shared cluster: killed ones lose nothing, and proofs come back judged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sparkray.cluster.processes import marked
from sparkray.config.poc import TINY, PocServiceConfig, WeightsConfig
from sparkray.poc.engine import Engine
from sparkray.poc.fleet.ledger import Ledger, read_cursors
from sparkray.poc.fleet.messages import Run
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.phases import Phase
from sparkray.poc.proofs import ProofBatch
from tests.ray.conftest import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
RUN = Run("0xabc123", 5, "pubkey1", 5.0, 0.01, TINY, WeightsConfig(), node_id=0, node_count=2, url="http://host")
WAIT_SECONDS = 240.0


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_actors_generate_lose_nothing_and_validate(ray_connection: None, tmp_path: Path) -> None:
    import ray

    from sparkray.poc.actors import RayHandle, start_fleet

    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    config = PocServiceConfig(device="cpu", num_groups=3, num_cpus_per_group=1, batch_size=16, poll_seconds=0.1)
    fleet = start_fleet(RUN, ledger, config)
    controller = fleet.controller
    wait_for(lambda: controller.all_loaded)
    assert fleet.change_phase(Phase.GENERATE, WAIT_SECONDS).num_acknowledged == 3
    wait_for(lambda: min(seat.cursor for seat in controller.seats) >= 32)
    with fleet.locked():
        handle = controller.seats[1].handle
    assert isinstance(handle, RayHandle)
    ray.kill(handle.actor)
    wait_for(lambda: controller.seats[1].num_launches == 2 and controller.seats[1].loaded)
    target = controller.seats[1].cursor + 32
    wait_for(lambda: controller.seats[1].cursor >= target)

    fleet.change_phase(Phase.VALIDATE, WAIT_SECONDS)
    expected = Engine("0xabc123", TINY, WeightsConfig(), device="cpu", batch_size=64).distances("other", range(100))
    fleet.receive("honest", ProofBatch("other", "0xabc123", 5, tuple(range(100)), tuple(expected.tolist()), 0))
    wait_for(lambda: controller.desk.num_open == 0)
    assert fleet.stop(WAIT_SECONDS)

    bodies = sent(ledger)
    (verdict,) = [body for url, body in bodies if url.endswith("/validated")]
    assert np.abs(np.array(verdict["dist"]) - expected).max() < 1e-6
    assert (verdict["n_invalid"], verdict["fraud_detected"]) == (0, False)
    assert_each_once_and_right(bodies, path)
    ledger.close()


def test_two_nodes_share_the_blocks_of_one_group(cluster: RayCluster, ray_connection: None, tmp_path: Path) -> None:
    from sparkray.poc.actors import start_fleet

    def stages() -> list[psutil.Process]:
        return [one for one in marked(cluster.session.mark) if "PocStageActor" in " ".join(one.cmdline())]

    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    config = PocServiceConfig(device="cpu", num_groups=1, num_nodes_per_group=2, batch_size=16, poll_seconds=0.1)
    fleet = start_fleet(RUN, ledger, config)
    (seat,) = fleet.controller.seats
    wait_for(lambda: seat.loaded)
    fleet.change_phase(Phase.GENERATE, WAIT_SECONDS)
    wait_for(lambda: seat.cursor >= 32)
    first = stages()
    # Workers are children of their node's raylet.
    assert len({stage.ppid() for stage in first}) == len(first) == 2

    first[1].kill()
    wait_for(lambda: seat.num_launches == 2 and seat.loaded)
    target = seat.cursor + 32
    wait_for(lambda: seat.cursor >= target)
    assert fleet.stop(WAIT_SECONDS)
    assert_each_once_and_right(sent(ledger), path)
    wait_for(lambda: not stages())
    ledger.close()


def sent(ledger: Ledger) -> list[tuple[str, dict[str, Any]]]:
    return [(delivery.url, json.loads(delivery.body)) for delivery in ledger.due(time.time(), 100_000)]


def assert_each_once_and_right(bodies: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """What goes out is what the cursors say, nonce by nonce, and the distances are an engine's of one process."""
    generated = [body for url, body in bodies if url.endswith("/generated")]
    received = {n: d for body in generated for n, d in zip(body["nonces"], body["dist"], strict=True)}
    assert sum(len(body["nonces"]) for body in generated) == len(received)
    done = {
        nonce
        for _, group_id, num_groups, cursor in read_cursors(path)
        for nonce in NonceIterator(0, 2, group_id, num_groups).take(cursor)
    }
    assert set(received) == done
    sample = sorted(received)[:40]
    engine = Engine("0xabc123", TINY, WeightsConfig(), device="cpu", batch_size=8)
    assert [received[nonce] for nonce in sample] == pytest.approx(engine.distances("pubkey1", sample), abs=1e-6)
