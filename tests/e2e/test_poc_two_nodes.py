"""Generate, callbacks, validate over two nodes: a worker is killed, a node goes and comes, the receiver is down."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from poc_nodes import Receiver, deploy, kill, two_nodes, wait_for

from sparkray.poc.fleet.ledger import read_cursors
from sparkray.poc.nonces import NonceIterator

NODE_ID, NODE_COUNT, NUM_GROUPS = 1, 3, 4
DOWN_SECONDS = 20.0
TINY = {
    "dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 128, "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": False, "seq_len": 16,
}  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_every_nonce_arrives_once_whatever_fails_on_the_way(tmp_path: Path) -> None:
    receiver = Receiver()
    with two_nodes(tmp_path) as nodes:
        settings = {"state_dir": str(tmp_path / "poc"), "num_groups": NUM_GROUPS, "num_cpus_per_group": 3}
        client = deploy(nodes, tmp_path, {**settings, "batch_size": 32})
        # With a target above 2 every nonce is valid, so what is received can be compared nonce by nonce.
        init = {
            "node_id": NODE_ID, "node_count": NODE_COUNT, "block_hash": "0xabc123", "block_height": 5,
            "public_key": "pubkey1", "batch_size": 1, "r_target": 5.0, "fraud_threshold": 0.01, "params": TINY,
            "url": receiver.url,
        }  # fmt: skip
        assert client.post("/pow/init/generate", init).status_code == 200
        wait_for("all groups", lambda: min(client.status()["progress"].get("cursors", [0])) > 0)
        assert client.status()["status"] == "GENERATING"
        assert (len(nodes.groups(second=False)), len(nodes.groups(second=True))) == (2, 2)

        # A worker is killed: its successor goes on.
        kill(nodes.groups(second=False)[0])
        wait_for("a successor", lambda: client.status()["progress"]["num_restarts"] >= 1)
        wait_for("two workers here", lambda: len(nodes.groups(second=False)) == 2)

        # The receiver is down for 20 seconds, and within them the second node stops.
        receiver.down()
        down_since = time.monotonic()
        before = client.status()["progress"]["cursors"]
        assert nodes.stop_second() > 0
        wait_for("the head's groups", lambda: sum(client.status()["progress"]["cursors"]) > sum(before) + 100)
        assert client.status()["progress"]["num_unsent"] > 0
        time.sleep(max(0.0, DOWN_SECONDS - (time.monotonic() - down_since)))
        receiver.up()

        # The node joins again, and its groups go on from their cursors.
        stopped = client.status()["progress"]["cursors"]
        nodes.start_second()
        wait_for(
            "every group to go on",
            lambda: all(now > then for now, then in zip(client.status()["progress"]["cursors"], stopped, strict=True)),
        )

        # Validation, with one bad proof in the batch.
        assert client.post("/pow/phase/validate").status_code == 200
        wait_for("VALIDATING", lambda: client.status()["status"] == "VALIDATING")
        first = receiver.bodies("/generated")[0]
        good = min(150, len(first["nonces"]))
        proof = {**first, "nonces": [*first["nonces"][:good], 10**6], "dist": [*first["dist"][:good], 7.0]}
        assert client.post("/pow/validate", proof).status_code == 200
        wait_for("the verdict", lambda: receiver.bodies("/validated"))
        (verdict,) = receiver.bodies("/validated")
        assert verdict["nonces"] == first["nonces"][:good]
        assert verdict["dist"] == pytest.approx(verdict["received_dist"], abs=1e-6)
        assert (verdict["n_invalid"], verdict["fraud_detected"]) == (0, False)
        assert [entry["index"] for entry in verdict["rejected"]] == [good]

        assert client.post("/pow/stop").status_code == 200
        wait_for("an empty outbox", lambda: client.status()["progress"]["num_unsent"] == 0)
        cursors = read_cursors(tmp_path / "poc" / "ledger.sqlite")
        assert len(cursors) == NUM_GROUPS
        done = [
            nonce
            for _, group_id, num_groups, cursor in cursors
            for nonce in NonceIterator(NODE_ID, NODE_COUNT, group_id, num_groups).take(cursor)
        ]
        received = receiver.nonces()
        assert len(received) == len(set(received)), "a nonce came twice"
        assert set(received) == set(done), "what came is not what the cursors say"
        wait_for("the groups to end", lambda: not nodes.groups(second=False) and not nodes.groups(second=True))
    receiver.down()
