"""What a handoff gains: a fast prefill node, a decode node that reads slowly, and both together.

    python benchmarks/handoff_gain.py --json

Stock vLLM (float32, both cores) is the prefill node. llama.cpp with the 4-bit copy of the same checkpoint, one thread
and --share of a core, is the decode node: it writes faster than vLLM and reads slower, as a Mac does beside a Spark.
Each prompt is answered by three routes in turns:

- `prefill_node`: vLLM reads and writes;
- `decode_node`: llama.cpp reads and writes;
- `handoff`: vLLM reads, rows cross, llama.cpp writes; a run that was not `full` ends the benchmark.

`gain_over_*` are ratios of medians of total seconds. `predicted` is the cost model with the rates of the two single
routes; `spark_and_mac` is the same model with EXO's measured rates, where nothing of this machine enters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Before vLLM is imported: standard output is for the result, and one machine needs no address of the outside.
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from sparkray.config.handoff import DecodeConfig, LinkRates, MachineRates, PrefillConfig
from sparkray.handoff.client import Peer
from sparkray.handoff.handing import Ask, Told, answer, collect, pair
from sparkray.handoff.local_peers import LocalPeer
from sparkray.handoff.plan import Work, alone_times, handoff_times, shape_of_identity
from sparkray.handoff.plan_report import plan_report
from sparkray.handoff.probe_text import prompts_of
from sparkray.handoff.vllm_prefill import PrefillEngine

ROUTES = ("prefill_node", "decode_node", "handoff")
PERIOD_SECONDS = 0.04


class CpuShare:
    """Lets a process run for a share of each period, by stopping it for the rest; use as a context manager."""

    def __init__(self, pid: int, share: float) -> None:
        self._pid, self._share = pid, share
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pace, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _pace(self) -> None:
        while not self._ended.wait(self._share * PERIOD_SECONDS) and self._share < 1:
            os.kill(self._pid, signal.SIGSTOP)
            time.sleep((1 - self._share) * PERIOD_SECONDS)
            os.kill(self._pid, signal.SIGCONT)


async def run_route(route: str, prefiller: PrefillEngine, peer: Peer, prompt: list[int], num: int) -> dict[str, float]:
    """One answer: seconds to its first and to its last token, and the bytes that crossed."""
    began = time.time()
    if route == "prefill_node":
        marks = [time.time() - began async for _ in prefiller.generate(prompt, num)]
        return {"first": marks[0], "total": marks[-1], "kv_bytes": 0.0}
    told, marks = Told(), []
    stream = answer(peer, Ask(tuple(prompt), num), prefiller if route == "handoff" else None, told)
    await collect(stream, told, lambda token: marks.append(time.time() - began))
    assert told.done is not None
    expected = "full" if route == "handoff" else "local"
    if told.done.verdict != expected:
        raise SystemExit(f"a {route} was {told.done.verdict} ({told.done.reason}); such a run is not counted")
    ended = told.prefill_ended_at - began if route == "handoff" else marks[0]
    return {"first": marks[0], "total": marks[-1], "kv_bytes": float(told.done.kv_bytes), "prefill_ended": ended}


async def measure(settings: argparse.Namespace, peer: Peer, pid: int) -> dict[str, Any]:
    """All routes in turns; each round has prompts of its own."""
    num = settings.output_tokens
    config = PrefillConfig(
        codec="raw", max_model_len=settings.prompt_tokens + num + 16, prefix_caching=False, chunk_tokens=512
    )
    prefiller = PrefillEngine(config)
    try:
        await pair(peer, prefiller)
        lengths = (settings.prompt_tokens,) * settings.rounds
        prompts = prompts_of(prefiller.folder, prefiller.vocabulary, lengths)
        runs: dict[str, list[dict[str, float]]] = {route: [] for route in ROUTES}
        with CpuShare(pid, settings.share):
            for route in ROUTES:
                # Caches and thread pools are warm from here on.
                await run_route(route, prefiller, peer, prompts[0][:32], 4)
            for prompt in prompts:
                for route in ROUTES:
                    runs[route].append(await run_route(route, prefiller, peer, prompt, num))
                    print(route, runs[route][-1], file=sys.stderr)
        shape = shape_of_identity(prefiller.identity, "float32")
    finally:
        prefiller.close()
    seen = {
        route: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for route, rows in runs.items()
    }
    return {"measured": seen, **compare(seen, shape, settings.prompt_tokens, num)}


def compare(seen: dict[str, dict[str, float]], shape: Any, num_prompt: int, num: int) -> dict[str, Any]:
    """Gains, and what the cost model says of the handoff from the rates of the two single routes."""
    work = Work(num_prompt, num)

    def rates(route: str) -> MachineRates:
        first, total = seen[route]["first"], seen[route]["total"]
        return MachineRates(
            name=route, source="measured", prefill_tokens_per_second=num_prompt / first,
            decode_tokens_per_second=(num - 1) / (total - first),
        )  # fmt: skip

    fast, slow = rates("prefill_node"), rates("decode_node")
    handed = handoff_times(shape, fast, slow, LinkRates(bytes_per_second=1e9, rtt_seconds=0.0002), work)
    totals = {route: seen[route]["total"] for route in ROUTES}
    predicted = {
        "prefill_node": alone_times("prefill_node", fast, work).total_seconds,
        "decode_node": alone_times("decode_node", slow, work).total_seconds,
        "handoff": handed.total_seconds,
    }
    rate = {
        route: [each.prefill_tokens_per_second, each.decode_tokens_per_second]
        for route, each in (("prefill_node", fast), ("decode_node", slow))
    }
    return {
        "tokens_per_second": rate,
        "total_seconds": totals,
        "predicted_total_seconds": predicted,
        "gain_over_decode_node": totals["decode_node"] / totals["handoff"],
        "gain_over_prefill_node": totals["prefill_node"] / totals["handoff"],
        "predicted_gain_over_decode_node": predicted["decode_node"] / predicted["handoff"],
        "predicted_gain_over_prefill_node": predicted["prefill_node"] / predicted["handoff"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line, and nothing else")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=1087)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.6, help="share of one core that the decode node has")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="handoff-gain-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text(os.urandom(16).hex())
        config = DecodeConfig(
            engine="llamacpp", model="embedded-gguf", kv_type="f16", num_threads=1, secret_file=str(secret),
            context_tokens=settings.prompt_tokens + settings.output_tokens + 16, max_sequences=2,
        )  # fmt: skip
        with LocalPeer(config, Path(folder) / "peer.log") as process:
            peer = Peer(process.wait_ready(), secret.read_bytes())
            found = asyncio.run(measure(settings, peer, process.pid))
    plan = plan_report("Llama-3.1-8B", 8192, 32, 10.0, "raw")
    exo = {
        "predicted_gain_over_decode_node": plan["speedup_over_decode_node"],
        "predicted_gain_over_prefill_node": plan["speedup_over_prefill_node"],
        "published_gain_over_decode_node": 6.42 / 2.32,
        "published_gain_over_prefill_node": 4.34 / 2.32,
        "predicted_total_seconds": {route: times["total_seconds"] for route, times in plan["routes"].items()},
    }
    result = {
        "benchmark": "handoff_gain", "prompt_tokens": settings.prompt_tokens, "output_tokens": settings.output_tokens,
        "rounds": settings.rounds, "share": settings.share, "load_average": os.getloadavg()[0], **found,
        "spark_and_mac": exo,
    }  # fmt: skip
    if not settings.json:
        for route, seconds in result["total_seconds"].items():
            print(f"{route}: {seconds:.2f} s, predicted {result['predicted_total_seconds'][route]:.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    # A time limit from outside leaves no peer behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
