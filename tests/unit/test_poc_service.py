"""The network's routes over a fleet of threads: bodies, codes, every bad input, callbacks and what survives a crash."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from fastapi.testclient import TestClient
from poc_threads import Fleet, distance_of, of_cursors, wait_for

from sparkray.config.poc import PocServiceConfig
from sparkray.errors import UnavailableError
from sparkray.poc.fleet.ledger import Delivery, Ledger
from sparkray.poc.fleet.messages import Run
from sparkray.poc.fleet.runner import FleetRunner
from sparkray.poc.service.manager import PocManager
from sparkray.poc.service.names import sign
from sparkray.poc.service.routes import Gate, create_app
from sparkray.poc.service.sender import Backoff, HttpPost, Outcome, Sender, send_due

INIT: dict[str, Any] = {
    "node_id": 1, "node_count": 3, "block_hash": "0x1", "block_height": 7, "public_key": "key", "batch_size": 1,
    "r_target": 2.5, "fraud_threshold": 0.01, "url": "http://127.0.0.1:9/",
    "params": {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 128, "seq_len": 16},
}  # fmt: skip
JSON = {"content-type": "application/json"}
GOOD = [nonce for nonce in range(100) if distance_of(nonce) < 1.9]


class Service:
    """Routes, manager and ledger over local fleets."""

    def __init__(self, tmp_path: Path, gate: Gate = Gate(), **settings: Any) -> None:  # noqa: B008 - frozen
        self.tmp_path = tmp_path
        self.fleets: list[Fleet] = []
        self.ledger = Ledger(tmp_path / "ledger.sqlite")
        self.load = Event()
        self.load.set()
        config = PocServiceConfig(**{"phase_timeout_seconds": 10.0, "stop_timeout_seconds": 10.0, **settings})
        self.manager = PocManager(config, self.ledger, self._start)
        self.client = TestClient(create_app(self.manager, gate), raise_server_exceptions=False)

    def _start(self, run: Run, ledger: Ledger) -> FleetRunner:
        assert self.load.wait(30)
        self.fleets.append(Fleet(self.tmp_path, run, 2, ledger))
        return self.fleets[-1].runner.start()

    def post(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        answer = self.client.post(f"/api/v1{path}", content=json.dumps(body), headers={**JSON, **headers})
        return answer.status_code, answer.json()

    def status(self) -> dict[str, Any]:
        answer = self.client.get("/api/v1/pow/status")
        assert answer.status_code == 200
        return dict(answer.json())

    def wait_state(self, state: str) -> None:
        wait_for(lambda: self.status()["status"] == state)

    def close(self) -> None:
        self.manager.close()
        self.ledger.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    made.close()


def proof(**changes: Any) -> dict[str, Any]:
    dist = [distance_of(nonce) for nonce in GOOD]
    body = {"public_key": "other", "block_hash": "0x1", "block_height": 7, "nonces": GOOD, "dist": dist, "node_id": 0}
    return {**body, **changes}


def test_before_init_status_answers_and_phases_are_refused(service: Service) -> None:
    assert service.status()["status"] == "NOT_LOADED"
    assert service.status()["is_model_initialized"] is False
    for path, body in (("/pow/phase/generate", None), ("/pow/phase/validate", None), ("/pow/validate", proof())):
        status, answer = service.post(path, body)
        assert status == 400, path
        assert "not running" in answer["detail"]
    assert service.post("/pow/stop")[0] == 200
    assert service.client.get("/api/v1/state").json() == {"state": "STOPPED"}


def test_init_returns_at_once_and_shows_that_it_loads(service: Service) -> None:
    service.load.clear()
    status, answer = service.post("/pow/init/generate", INIT)
    assert status == 200
    assert answer["status"] == "OK"
    assert (answer["pow_status"]["status"], answer["pow_status"]["is_model_initialized"]) == ("LOADING", False)
    service.load.set()
    service.wait_state("GENERATING")
    assert service.status()["is_model_initialized"] is True
    assert service.status()["progress"]["num_groups"] == 2
    assert service.client.get("/api/v1/state").json() == {"state": "POW"}


def test_phases_follow_requests_and_an_identical_init_starts_nothing_anew(service: Service) -> None:
    assert service.post("/pow/init", INIT)[0] == 200
    service.wait_state("IDLE")
    status, answer = service.post("/pow/phase/generate")
    assert (status, answer["pow_status"]["status"]) == (200, "GENERATING")
    assert service.post("/pow/phase/validate")[1]["pow_status"]["status"] == "VALIDATING"
    assert service.post("/pow/init/generate", INIT)[0] == 200
    service.wait_state("GENERATING")
    assert len(service.fleets) == 1
    assert service.post("/pow/stop")[1]["pow_status"]["status"] == "NOT_LOADED"


def test_init_with_another_block_during_generate_starts_anew_and_loses_nothing(service: Service) -> None:
    service.post("/pow/init/generate", INIT)
    wait_for(lambda: len(service.fleets) == 1 and service.fleets[0].controller.monitor.num_total > 50)
    assert service.post("/pow/init/generate", {**INIT, "block_hash": "0x2"})[0] == 200
    wait_for(lambda: len(service.fleets) == 2 and service.fleets[1].controller.monitor.num_total > 50)
    service.post("/pow/stop")
    first, second = (
        [n for body in service.fleets[0].bodies() if body["block_hash"] == block for n in body["nonces"]]
        for block in ("0x1", "0x2")
    )
    for nonces in (first, second):
        assert len(nonces) == len(set(nonces))
    assert sorted(first + second) == sorted(of_cursors(service.fleets[0].path, service.fleets[0].controller.run))
    # The first block again goes on where it was: no nonce of it comes twice.
    service.post("/pow/init/generate", INIT)
    wait_for(lambda: len(service.fleets) == 3 and service.fleets[2].controller.monitor.num_total > 50)
    service.post("/pow/stop")
    again = [n for body in service.fleets[0].bodies() if body["block_hash"] == "0x1" for n in body["nonces"]]
    assert len(again) == len(set(again)) > len(first)


def test_a_wish_that_comes_back_while_another_one_loads_is_fulfilled(service: Service) -> None:
    service.post("/pow/init/generate", INIT)
    service.wait_state("GENERATING")
    service.load.clear()
    service.post("/pow/init/generate", {**INIT, "block_hash": "0x2"})
    wait_for(lambda: service.status()["status"] == "LOADING" and not service.status()["progress"].get("num_groups"))
    service.post("/pow/init/generate", INIT)
    service.load.set()
    service.wait_state("GENERATING")
    assert service.fleets[-1].controller.run.block_hash == "0x1"
    wait_for(lambda: service.fleets[-1].controller.monitor.num_total > 20)


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        ("/pow/init/generate", {"node_id": -1}, 400),
        ("/pow/init/generate", {"node_count": -1, "node_id": -1}, 400),
        ("/pow/init", {"node_id": 3}, 400),
        ("/pow/init/generate", {"node_id": 7}, 400),
        ("/pow/init/validate", {"node_id": 0, "node_count": 0}, 400),
        ("/pow/init", {"r_target": 0.0}, 422),
        ("/pow/init", {"r_target": -1.0}, 422),
        ("/pow/init", {"r_target": float("nan")}, 422),
        ("/pow/init", {"fraud_threshold": 0.0}, 422),
        ("/pow/init", {"batch_size": None}, 422),
        ("/pow/init", {"url": "ftp://host"}, 422),
        ("/pow/init", {"url": "host:80"}, 422),
        ("/pow/init", {"params": {"dim": 100, "n_heads": 3}}, 422),
        ("/pow/init", {"params": {"colour": 1}}, 422),
        ("/pow/init", {"public_key": ["a", "b"]}, 422),
        ("/pow/init", {"node_id": -2}, 422),
    ],
)
def test_a_bad_init_is_refused_and_what_runs_goes_on(
    service: Service, path: str, changes: dict[str, Any], expected: int
) -> None:
    service.post("/pow/init/validate", INIT)
    service.wait_state("VALIDATING")
    status, answer = service.post(path, {**INIT, **changes})
    assert status == expected
    assert answer["detail"]
    assert service.status()["status"] == "VALIDATING"
    assert len(service.fleets) == 1


def test_generate_needs_its_nonces_and_validate_does_not(service: Service) -> None:
    unset = {key: value for key, value in INIT.items() if key not in ("node_id", "node_count")}
    assert service.post("/pow/init/validate", unset)[0] == 200
    service.wait_state("VALIDATING")
    assert service.post("/pow/phase/generate")[0] == 400
    assert service.status()["status"] == "VALIDATING"


def test_good_proofs_are_judged_whatever_else_a_batch_holds(service: Service) -> None:
    service.post("/pow/init/validate", {**INIT, "r_target": 1.9})
    service.wait_state("VALIDATING")
    bad_nonces, bad_dist = [101, 102, -5, GOOD[0], 10**30], [float("nan"), 1.95, 1.0, 1.0, 1.0]
    mixed = proof(nonces=GOOD + bad_nonces, dist=[*map(distance_of, GOOD), *bad_dist])
    assert service.post("/pow/validate", mixed) == (200, None)
    (fleet,) = service.fleets
    wait_for(lambda: len(fleet.bodies()) == 1)
    (body,) = fleet.bodies()
    assert body["nonces"] == GOOD
    assert body["received_dist"] == body["dist"] == [distance_of(nonce) for nonce in GOOD]
    assert (body["r_target"], body["fraud_threshold"], body["n_invalid"]) == (1.9, 0.01, 0)
    assert (body["probability_honest"], body["fraud_detected"]) == (1.0, False)
    reasons = {entry["index"] - len(GOOD): entry["reason"] for entry in body["rejected"]}
    assert sorted(reasons) == [0, 1, 2, 3, 4]
    assert "not a number" in reasons[0]
    assert "not below r_target" in reasons[1]
    assert "negative" in reasons[2]
    assert "already given" in reasons[3]
    # Another node's nonces, where the sender says how many nodes there are.
    assert service.post("/pow/validate", proof(node_count=2)) == (200, None)
    wait_for(lambda: len(fleet.bodies()) == 2)
    assert fleet.bodies()[1]["nonces"] == [nonce for nonce in GOOD if nonce % 2 == 0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block_hash": "0x9"}, 400),
        ({"node_id": 5, "node_count": 5}, 400),
        ({"public_key": ["a", "b"]}, 422),
        ({"nonces": [1.5], "dist": [1.0]}, 422),
        ({"nonces": [1], "dist": []}, 422),
        ({"dist": None}, 422),
        ({"nonces": list(range(300)), "dist": [1.0] * 300}, 413),
    ],
)
def test_a_batch_that_cannot_be_validated_is_refused_as_a_whole(
    tmp_path: Path, changes: dict[str, Any], expected: int
) -> None:
    service = Service(tmp_path, max_batch_nonces=200)
    service.post("/pow/init/validate", INIT)
    service.wait_state("VALIDATING")
    assert service.post("/pow/validate", proof(**changes))[0] == expected
    assert service.post("/pow/validate", proof()) == (200, None)
    wait_for(lambda: len(service.fleets[0].bodies()) == 1)
    service.close()


def test_a_full_disk_is_answered_and_the_service_goes_on(service: Service) -> None:
    service.ledger.limit_pages(1)
    status, answer = service.post("/pow/init", {**INIT, "public_key": "k" * 200_000})
    assert status == 503
    assert "full" in answer["detail"]
    service.ledger.limit_pages(100_000)
    assert service.post("/pow/init", INIT)[0] == 200
    service.wait_state("IDLE")


def test_a_new_process_goes_on_with_what_was_wanted(tmp_path: Path) -> None:
    first = Service(tmp_path)
    first.post("/pow/init/generate", INIT)
    wait_for(lambda: len(first.fleets) == 1 and first.fleets[0].controller.monitor.num_total > 50)
    first.close()
    before = len(of_cursors(first.fleets[0].path, first.fleets[0].controller.run))
    second = Service(tmp_path)
    second.wait_state("GENERATING")
    wait_for(lambda: second.fleets[0].controller.monitor.num_total > 50)
    second.post("/pow/stop")
    received = second.fleets[0].received()
    assert len(received) == len(set(received)) > before
    assert sorted(received) == sorted(of_cursors(first.fleets[0].path, first.fleets[0].controller.run))
    second.close()


def test_a_fleet_that_cannot_start_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path)
    start, tries = service._start, []

    def fail_twice(run: Run, ledger: Ledger) -> FleetRunner:
        tries.append(run)
        if len(tries) == 1:
            raise UnavailableError("no device is large enough.")
        if len(tries) == 2:
            raise RuntimeError("the cluster is restarting")
        return start(run, ledger)

    monkeypatch.setattr(service.manager, "_start_fleet", fail_twice)
    failures: set[str] = set()
    service.post("/pow/init", INIT)

    def is_idle() -> bool:
        status = service.status()
        failures.add(status["progress"].get("failure", ""))
        return bool(status["status"] == "IDLE")

    wait_for(is_idle)
    assert {"no device is large enough.", "RuntimeError: the cluster is restarting"} <= failures
    service.close()


def test_token_and_signature_are_asked_for_where_they_are_set(tmp_path: Path) -> None:
    gate = Gate.from_environment({"SPARKRAY_POC_TOKEN": "t0ken", "SPARKRAY_POC_SIGNING_KEY": "secret"})
    service = Service(tmp_path, gate)
    body = json.dumps(INIT)
    signature = sign("secret", "POST", "/api/v1/pow/init", body.encode())
    # HMAC-SHA256 by `openssl dgst -sha256 -hmac secret` over "GET /api/v1/pow/status\n".
    assert sign("secret", "GET", "/api/v1/pow/status", b"") == (
        "bcb2349563db724efef12f06b031a2a9c694bbe2eac4912406b0845744be1f79"
    )
    bearer = {"authorization": "Bearer t0ken"}
    assert service.post("/pow/init", INIT)[0] == 401
    assert service.post("/pow/init", INIT, authorization="Bearer wrong")[0] == 401
    assert service.post("/pow/init", INIT, **bearer)[0] == 403
    assert service.post("/pow/init", {**INIT, "node_id": 2}, **bearer, **{"x-signature": signature})[0] == 403
    assert service.post("/pow/stop", INIT, **bearer, **{"x-signature": signature})[0] == 403
    assert service.post("/pow/init", INIT, **bearer, **{"x-signature": signature})[0] == 200
    assert service.client.get("/health").status_code == 200
    service.close()
    assert Gate.from_environment({"SPARKRAY_POC_TOKEN": ""}) == Gate(None, None)


class Receiver:
    """A callback receiver on this machine that answers as it is told."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, str | None, Any]] = []
        self.status = 200
        self.delay_seconds = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(outer.delay_seconds)
                if outer.status == 200:
                    outer.bodies.append((self.path, self.headers["Idempotency-Key"], json.loads(content)))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_callbacks_arrive_once_after_refusals_and_slow_answers(tmp_path: Path) -> None:
    ledger, receiver = Ledger(tmp_path / "l.sqlite"), Receiver()
    ledger.enqueue("a", f"{receiver.url}/generated", {"n": 1})
    ledger.enqueue("b", f"{receiver.url}/validated", {"n": 2})
    sender = Sender(ledger, timeout_seconds=0.3, interval_seconds=0.02, max_backoff_seconds=0.05)
    receiver.status = 500
    sender.start()
    wait_for(lambda: ledger.attempts() >= 2)
    receiver.status, receiver.delay_seconds = 200, 5.0
    wait_for(lambda: ledger.attempts() >= 4)
    assert ledger.num_unsent() == 2
    receiver.delay_seconds = 0.0
    wait_for(lambda: ledger.num_unsent() == 0)
    sender.stop()
    # A receiver that was slow has taken some bodies before: the key tells that they are the same.
    assert {(path, key, body["n"]) for path, key, body in receiver.bodies} == {
        ("/generated", "a", 1),
        ("/validated", "b", 2),
    }
    receiver.close()


def test_an_address_that_is_down_is_left_alone_and_others_are_not(tmp_path: Path) -> None:
    ledger, now, tried = Ledger(tmp_path / "l.sqlite"), [100.0], []
    for number in range(3):
        ledger.enqueue(f"down{number}", "http://down", {})
        ledger.enqueue(f"up{number}", "http://up", {})

    def post(delivery: Delivery) -> Outcome:
        tried.append(delivery.key)
        return Outcome("refused", reached=False) if "down" in delivery.url else Outcome()

    backoff = Backoff(max_seconds=4.0, draw=lambda: 1.0)
    assert send_due(ledger, post, backoff, lambda: now[0]) == 3
    assert tried == ["down0", "up0", "up1", "up2"]
    pauses = []
    for _ in range(5):
        start = now[0]
        while len(tried) == len(set(tried)) + len(pauses) and now[0] < start + 60:
            now[0] += 0.5
            send_due(ledger, post, backoff, lambda: now[0])
        pauses.append(now[0] - start)
    # 1, 2, 4 and then the longest pause.
    assert pauses == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert ledger.num_unsent() == 3


def test_one_body_that_is_refused_does_not_hold_up_the_others(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.enqueue("poison", "http://up", {})
    ledger.enqueue("fine", "http://up", {})

    def post(delivery: Delivery) -> Outcome:
        return Outcome("HTTP 400") if delivery.key == "poison" else Outcome()

    assert send_due(ledger, post, Backoff(8.0), lambda: 0.0) == 1
    assert [delivery.key for delivery in ledger.due(100.0, 10)] == ["poison"]


def test_a_refused_connection_and_a_redirect_are_failures() -> None:
    post = HttpPost(1.0)
    outcome = post(Delivery(1, "k", "http://127.0.0.1:9/generated", "{}", 0))
    assert outcome.error is not None
    assert not outcome.reached
    receiver = Receiver()
    receiver.status = 302
    outcome = post(Delivery(1, "k", f"{receiver.url}/generated", "{}", 0))
    assert outcome == Outcome("HTTP 302: ", reached=True)
    receiver.status = 503
    assert not post(Delivery(1, "k", f"{receiver.url}/generated", "{}", 0)).reached
    receiver.close()
    post.close()


def test_a_sender_survives_a_ledger_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, receiver = Ledger(tmp_path / "l.sqlite"), Receiver()
    ledger.enqueue("a", f"{receiver.url}/generated", {"n": 1})
    working = ledger.mark_sent

    def full(delivery: Delivery) -> None:
        raise UnavailableError("the disk is full.")

    monkeypatch.setattr(ledger, "mark_sent", full)
    sender = Sender(ledger, timeout_seconds=5, interval_seconds=0.01, max_backoff_seconds=0.05).start()
    wait_for(lambda: len(receiver.bodies) >= 2)
    assert sender.last_error == "the disk is full."
    monkeypatch.setattr(ledger, "mark_sent", working)
    wait_for(lambda: ledger.num_unsent() == 0)
    sender.stop()
    assert {key for _, key, _ in receiver.bodies} == {"a"}
    receiver.close()
