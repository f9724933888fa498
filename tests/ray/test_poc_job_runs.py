"""The three jobs of proof of compute as a user submits them: all end SUCCEEDED, with what one engine computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparkray.config.poc import TINY, WeightsConfig
from sparkray.poc.engine import Engine
from sparkray.poc.fleet.ledger import read_cursors
from sparkray.poc.nonces import NonceIterator
from tests.ray.conftest import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
R_TARGET = 1.39
PARAMS = (("--set", f"poc.params.{name}={json.dumps(value)}") for name, value in TINY.model_dump().items())
# On two groups, one a node where Ray spreads them.
TINY_FLAGS = (
    *(word for pair in PARAMS for word in pair),
    *("--set", "poc.device=cpu", "--set", f"poc.r_target={R_TARGET}", "--set", "poc.batch_size=16"),
)
FLEET_FLAGS = (
    *("--set", "fleet.device=cpu", "--set", "fleet.num_groups=2", "--set", "fleet.batch_size=16"),
    *("--set", "fleet.poll_seconds=0.2"),
)


def submit(cluster: RayCluster, name: str, *arguments: object) -> dict[str, Any]:
    """Run a job to its end; the summary that it printed."""
    words = ("--working-dir", str(REPOSITORY), "--", "python", *map(str, arguments), "--json")
    done = cluster.ray("job", "submit", f"--submission-id={name}", *words, timeout_seconds=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert cluster.job_status(name) == "SUCCEEDED"
    summary: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return summary


@pytest.mark.slow
def test_a_generation_that_is_submitted_again_goes_on_and_writes_each_nonce_once(
    cluster: RayCluster, tmp_path: Path
) -> None:
    output = tmp_path / "proofs.jsonl"
    names = ("--set", "poc.block_hash=0xabc123", "--set", "poc.public_key=pubkey1", "--set", "poc.node_id=1")
    flags = ("--output", output, "--count", 200, *names, "--set", "poc.node_count=2", *TINY_FLAGS, *FLEET_FLAGS)
    summaries = [submit(cluster, f"poc-generate-{number}", "jobs/poc_generate.py", *flags) for number in range(2)]
    assert all(summary["all_recorded"] and summary["num_recorded"] >= 200 for summary in summaries)

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {nonce: dist for line in lines for nonce, dist in zip(line["nonces"], line["dist"], strict=True)}
    assert sum(len(line["nonces"]) for line in lines) == len(found) == sum(s["num_valid"] for s in summaries)
    cursors = read_cursors(output.with_name("proofs.jsonl.ledger"))
    assert sum(cursor for *_, cursor in cursors) == sum(summary["num_recorded"] for summary in summaries)
    done = [nonce for _, group, groups, cursor in cursors for nonce in NonceIterator(1, 2, group, groups).take(cursor)]
    dist = Engine("0xabc123", TINY, WeightsConfig(), device="cpu", batch_size=64).distances("pubkey1", done)
    valid = {nonce: value for nonce, value in zip(done, dist.tolist(), strict=True) if value < R_TARGET}
    assert found == pytest.approx(valid, abs=1e-6)


def test_rates_are_told_for_every_worker(cluster: RayCluster) -> None:
    flags = ("--seconds", 3, "--warmup-seconds", 0.5, *TINY_FLAGS, *FLEET_FLAGS)
    summary = submit(cluster, "poc-rate", "jobs/poc_nonce_rate.py", *flags)
    rates = summary["raw_per_minute_by_worker"]
    assert summary["num_workers"] == len(rates) == 2
    assert all(rate > 0 for rate in rates)
    assert summary["raw_per_minute"] == pytest.approx(sum(rates))
    assert 0 < summary["valid_per_minute"] < summary["raw_per_minute"]
    assert summary["init_seconds"] > 0 and not summary["share_alarm"] and summary["mfu"] is None


def test_two_servers_come_to_the_same_verdicts(cluster: RayCluster) -> None:
    summary = submit(cluster, "poc-cross", "jobs/poc_cross_check.py", "--num-nonces", 200, *TINY_FLAGS)
    assert {server["server"] for server in summary["servers"]} == {cluster.network.head_ip, cluster.network.node_ip}
    (pair,) = summary["pairs"]
    assert pair["changed_verdicts"] == [] and summary["same_verdicts"] is True
    assert pair["largest_difference"] < 1e-6
    assert all(server["device"] == "cpu" and server["batch_size"] == 16 for server in summary["servers"])
