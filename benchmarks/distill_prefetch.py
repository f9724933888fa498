"""Does asking ahead hide a teacher's latency: `python benchmarks/distill_prefetch.py --json`.

A real vLLM server, or with `--server transformers` the same model behind the same route without vLLM, scores a packed
text; its answers are kept by a relay, which then gives them back with a latency of
50 and 200 ms and, now and then, a 429. So what is measured is the waiting that asking ahead can hide, and not the
engine's share of the cores. A student of real size trains on them, with prefetch and without, in turn; its idle share
is the time in which it waited for rows over the time of its steps. The relay counts the requests in flight and the
number of log-probabilities that each asked for: `num_wrong_widths` are the requests that asked for 20 where a 429
called for 10, or for 10 where ten answers had called for 20 again.

Last, a run against the live teacher fills the cache, and the same run again is answered from it: its hit rate, the
largest difference of a step's loss, and how long a read takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import torch

from sparkray.config.base import validate_settings
from sparkray.config.distill import ClientConfig, DistillConfig, StoreConfig, TeacherConfig
from sparkray.distill.cache.file import ScoreCache
from sparkray.distill.client.client import TeacherClient
from sparkray.distill.client.counters import quantile
from sparkray.distill.data.pack import Pack
from sparkray.distill.identity import score_key
from sparkray.distill.run import make_pack
from sparkray.distill.students.causal import create_causal_student
from sparkray.distill.teachers.create import create_teacher
from sparkray.distill.teachers.vllm_server import vllm_server
from sparkray.distill.training.objective import CausalObjective
from sparkray.distill.training.supervision import FromClient
from sparkray.distill.training.trainer import Trainer
from sparkray.models import prepare_model

TOP_LOGPROBS, REDUCED, SUCCESSES = 20, 10, 10


class Relay:
    """Answers of a server, kept by request, given back late and sometimes refused."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._answers: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.latency_seconds = 0.0
        self.refuse_every = 0
        self.reset()

    def reset(self) -> None:
        """Forget the counts."""
        self.in_flight = self.peak_in_flight = self.num_requests = self.num_refused = 0
        self.events: list[tuple[str, int]] = []

    def handle(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Answer one request."""
        asked = json.loads(body).get("prompt_logprobs", 0)
        with self._lock:
            self.num_requests += 1
            self.in_flight += 1
            self.events.append(("asked", asked))
            self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
            refused = bool(self.refuse_every) and self.num_requests % self.refuse_every == 0
            self.num_refused += refused
        try:
            time.sleep(self.latency_seconds)
            status, answer = (429, b"{}") if refused else (200, self._answer(path, body))
            return status, answer, {"Retry-After": "0"} if refused else {}
        finally:
            with self._lock:
                self.in_flight -= 1
                self.events.append(("answered", status))

    def _answer(self, path: str, body: bytes) -> bytes:
        key = f"{path}\n{body.decode()}"
        if key not in self._answers:
            response = httpx.post(
                self._upstream + path, content=body, timeout=300, headers={"Content-Type": "application/json"}
            )
            response.raise_for_status()
            self._answers[key] = response.content
        return self._answers[key]


def main() -> None:
    """Print the shares; the last line is one JSON object under `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--sequence-tokens", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--refuse-every", type=int, default=40, help="Every so many requests, one is answered with 429."
    )
    parser.add_argument("--server", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.server == "vllm":
        server = vllm_server(prepare_model("embedded"), name="teacher", max_model_tokens=512, max_logprobs=TOP_LOGPROBS)
    else:
        server = forward_server()
    with tempfile.TemporaryDirectory() as folder, server as upstream:
        relay = Relay(upstream.removesuffix("/v1"))
        with serve(relay.handle) as url:
            report = measure(arguments, relay, f"{url}/v1", Path(folder))
    for key, value in report.items():
        print(f"{key:34} {value}")
    if arguments.json:
        print(json.dumps(report))


def measure(arguments: argparse.Namespace, relay: Relay, url: str, folder: Path) -> dict[str, Any]:
    """Idle shares with and without prefetch at both latencies, and what the relay counted."""
    config = validate_settings(
        DistillConfig,
        {
            "pack": {
                "sequence_tokens": arguments.sequence_tokens,
                "max_sequences": arguments.steps * arguments.batch_sequences,
            },
            "teacher": {
                "kind": "api",
                "base_url": url,
                "model": "teacher",
                "tokenizer": "embedded",
                "max_model_tokens": 512,
                "overlap_tokens": 64,
            },
            "client": {"backoff_seconds": 0.01},
            "loss": {"target": "tail_bucket"},
            "student": {
                "hidden_size": arguments.hidden_size,
                "num_layers": 6,
                "num_heads": 4,
                "intermediate_size": 4 * arguments.hidden_size,
            },
            "train": {
                "num_steps": arguments.steps,
                "batch_sequences": arguments.batch_sequences,
                "micro_batch_sequences": arguments.batch_sequences,
            },
        },
    )
    pack = make_pack("python-docs", folder / "pack", config)
    for top_logprobs in (TOP_LOGPROBS, REDUCED):
        record(config, pack, top_logprobs)
    relay.refuse_every = arguments.refuse_every
    shares: dict[tuple[int, bool], list[float]] = {}
    peak = num_refused = num_wrong = num_recoveries = 0
    for _ in range(arguments.rounds):
        for latency_ms in (50, 200):
            for ahead in (True, False):
                relay.reset()
                relay.latency_seconds = latency_ms / 1000
                shares.setdefault((latency_ms, ahead), []).append(idle_share(config, pack, ahead=ahead))
                peak, num_refused = max(peak, relay.peak_in_flight), num_refused + relay.num_refused
                wrong, recoveries = judge_widths(relay.events, config.client.max_in_flight)
                num_wrong, num_recoveries = num_wrong + wrong, num_recoveries + recoveries
    relay.refuse_every = 0
    medians = {key: statistics.median(values) for key, values in shares.items()}
    return {
        "idle_share_prefetch": max(medians[50, True], medians[200, True]),
        "idle_share_prefetch_50ms": medians[50, True],
        "idle_share_prefetch_200ms": medians[200, True],
        "idle_share_without_50ms": medians[50, False],
        "idle_share_without_200ms": medians[200, False],
        "peak_in_flight": peak,
        "num_429": num_refused,
        "num_wrong_widths": num_wrong,
        "num_recoveries": num_recoveries,
        "asked_10_after_429_and_20_after_10_successes": num_wrong == 0 and num_recoveries > 0,
        **second_epoch(config, pack, folder),
        "server": arguments.server,
        "num_rounds": arguments.rounds,
        "num_steps": arguments.steps,
    }


def record(config: DistillConfig, pack: Pack, top_logprobs: int) -> None:
    """Let the server score every sequence once at a number of log-probabilities."""
    client = config.client.model_copy(update={"top_logprobs": top_logprobs})
    teacher = create_teacher(config.teacher, config.store, client)
    with TeacherClient(teacher, client) as asking:
        for future in [asking.submit(pack.train.tokens(number)) for number in range(len(pack.train))]:
            future.result()


def idle_share(config: DistillConfig, pack: Pack, *, ahead: bool) -> float:
    """Train once over the pack; the share of its steps that the student waited, the first step left out."""
    student = create_causal_student(
        config.student, vocab_size=pack.header.vocab_size, max_tokens=pack.header.sequence_tokens, seed=0
    )
    client = config.client
    teacher = create_teacher(config.teacher, config.store, client)
    with TeacherClient(teacher, client) as asking:
        rows: Any = FromClient(asking, pack.train.tokens)
        if not ahead:
            rows = OnDemand(rows)
        trainer = Trainer(student, pack, rows, CausalObjective(config.loss), config.train, {})
        reports = [trainer.run_step() for _ in range(config.train.num_steps)][1:]
    return sum(report.waited_seconds for report in reports) / sum(report.seconds for report in reports)


class OnDemand:
    """Supervision that is never asked for ahead."""

    def __init__(self, inner: FromClient) -> None:
        self._inner = inner

    def rows(self, sequences: Any, upcoming: Any) -> Any:
        """Rows of some sequences, asked for now."""
        return self._inner.rows(sequences, [])


def second_epoch(config: DistillConfig, pack: Pack, folder: Path) -> dict[str, float | None]:
    """Train on the live teacher with a cache, then once more: all from the cache, with the same losses."""
    cached = config.cache.model_copy(update={"path": folder / "scores.sqlite"})

    def run(rows: FromClient) -> list[float]:
        student = create_causal_student(
            config.student, vocab_size=pack.header.vocab_size, max_tokens=pack.header.sequence_tokens, seed=0
        )
        trainer = Trainer(student, pack, rows, CausalObjective(config.loss), config.train, {})
        return [trainer.run_step().loss for _ in range(config.train.num_steps)]

    losses, metrics = [], []
    for _ in range(2):
        teacher = create_teacher(config.teacher, config.store, config.client)
        with ScoreCache(cached) as cache, TeacherClient(teacher, config.client, cache) as asking:
            losses.append(run(FromClient(asking, pack.train.tokens)))
            metrics.append(asking.metrics)
    keys = [score_key(teacher.identity, pack.train.tokens(n), teacher.parameters) for n in range(len(pack.train))]
    with ScoreCache(cached) as cache:
        reads = sorted(timed_read(cache, key) for _ in range(5) for key in keys)
    return {
        "cache_read_p50_ms": 1000 * (quantile(reads, 0.5) or 0.0),
        "cache_read_p95_ms": 1000 * (quantile(reads, 0.95) or 0.0),
        "second_epoch_hit_rate": metrics[1].hit_rate,
        "second_epoch_loss_difference": max(abs(live - kept) for live, kept in zip(*losses, strict=True)),
    }


def timed_read(cache: ScoreCache, key: bytes) -> float:
    """Seconds of one read that must be a hit."""
    begun = time.perf_counter()
    found = cache.get(key, top_logprobs=TOP_LOGPROBS)
    seconds = time.perf_counter() - begun
    assert found is not None
    return seconds


def judge_widths(events: list[tuple[str, int]], max_in_flight: int) -> tuple[int, int]:
    """Requests of the wrong width, and returns to 20, in the order in which the relay saw requests and its answers.

    The client's policy is followed from outside, so what the relay sees differs by what is under way. After a 429, and
    after the tenth answer, as many requests as fit beside it in flight may have been written before the client read it;
    and answers that left just before the 429 may be read after it, so the return to 20 may come as many answers early.
    """
    beside = max_in_flight - 1
    reduced, successes, excused = False, 0, 0
    num_wrong = num_recoveries = 0
    for kind, value in events:
        if kind == "answered" and value == 429:
            reduced, successes, excused = True, 0, beside
            continue
        if kind == "answered":
            successes += 1
        else:
            early = reduced and not excused and value == TOP_LOGPROBS and successes >= SUCCESSES - beside
            if early:
                successes = SUCCESSES
            else:
                num_wrong += value != (REDUCED if reduced else TOP_LOGPROBS) and not excused
            excused = max(0, excused - 1)
        if reduced and successes >= SUCCESSES:
            reduced, excused = False, beside
            num_recoveries += 1
    return num_wrong, num_recoveries


@contextmanager
def forward_server() -> Iterator[str]:
    """The embedded model by transformers, behind the route and in the shape of vLLM's prompt log-probabilities."""
    teacher = create_teacher(TeacherConfig(), StoreConfig(), ClientConfig())
    lock = threading.Lock()

    def answer(path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        request = json.loads(body)
        with lock:
            scores = teacher.score(request["prompt"], request["prompt_logprobs"])
        positions: list[dict[int, dict[str, float]] | None] = [None]
        for token, own, ids, logprobs in zip(
            request["prompt"][1:],
            scores.token_logprobs_L.tolist(),
            scores.head_ids_LK.tolist(),
            scores.head_logprobs_LK.tolist(),
            strict=True,
        ):
            named = {token: own, **dict(zip(ids, logprobs, strict=True))}
            positions.append({number: {"logprob": logprob} for number, logprob in named.items()})
        return 200, json.dumps({"choices": [{"prompt_logprobs": positions}]}).encode(), {}

    with serve(answer) as url:
        yield f"{url}/v1"


@contextmanager
def serve(answer: Callable[[str, bytes], tuple[int, bytes, dict[str, str]]]) -> Iterator[str]:
    """A function of path and body behind HTTP."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, body, headers = answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    main()
