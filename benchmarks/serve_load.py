"""32 concurrent streams, 8 of them cut mid-way: the others complete, and the engine is idle again within 5 s.

    python benchmarks/serve_load.py [--url http://127.0.0.1:8000] [--json]

Without --url a server with the embedded model is started for the run and ended after it. The last line is one JSON
object: counts, p50 and p95 of the time to the first token and between tokens, and how long the engine took to be idle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
from openai import AsyncOpenAI

IDLE_LIMIT_SECONDS = 5.0
RUNNING = "vllm:num_requests_running"


@dataclass
class StreamResult:
    """What one client saw."""

    cut: bool
    num_chunks: int = 0
    finish_reason: str | None = None
    first_token_seconds: float | None = None
    gaps_seconds: list[float] = field(default_factory=list)
    error: str | None = None


async def one_stream(
    client: AsyncOpenAI, model: str, number: int, *, num_tokens: int, cut_after: int | None
) -> StreamResult:
    """One chat stream; with `cut_after` its connection is closed after that many chunks."""
    result = StreamResult(cut=cut_after is not None)
    start = last = time.perf_counter()
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Write a long story about the number {number}."}],
            max_tokens=num_tokens,
            temperature=0.8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async with stream:
            async for chunk in stream:
                now = time.perf_counter()
                choice = chunk.choices[0]
                if choice.delta.content:
                    if result.first_token_seconds is None:
                        result.first_token_seconds = now - start
                    else:
                        result.gaps_seconds.append(now - last)
                    last = now
                    result.num_chunks += 1
                result.finish_reason = choice.finish_reason or result.finish_reason
                if cut_after is not None and result.num_chunks >= cut_after:
                    return result
    except Exception as failure:  # a benchmark reports whatever a client meets
        result.error = f"{type(failure).__name__}: {failure}"
    return result


def num_running(page: str) -> int:
    """Requests running, by the exposition of all replicas."""
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in page.splitlines() if line.startswith(RUNNING + "{"))


async def seconds_until_idle(url: str, limit_seconds: float) -> float | None:
    """How long until /metrics says that nothing runs; None past the limit."""
    start = time.perf_counter()
    async with httpx.AsyncClient(timeout=limit_seconds) as http:
        while (waited := time.perf_counter() - start) < limit_seconds:
            if num_running((await http.get(f"{url}/metrics")).text) == 0:
                return waited
            await asyncio.sleep(0.1)
    return None


def percentile(values: list[float], share: int) -> float | None:
    """The `share`-th percentile, None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100)[share - 1]


async def run(url: str, *, num_streams: int, num_cut: int, num_tokens: int) -> dict[str, object]:
    """The whole load against a running server."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = (await client.models.list()).data[0].id
    await one_stream(client, model, 0, num_tokens=4, cut_after=None)  # warm
    cuts = [number % (num_streams // num_cut) == 0 if num_cut else False for number in range(num_streams)]
    tasks = [
        one_stream(client, model, number, num_tokens=num_tokens, cut_after=num_tokens // 2 if cut else None)
        for number, cut in enumerate(cuts)
    ]
    pending = asyncio.gather(*tasks)
    peak = 0
    async with httpx.AsyncClient(timeout=30) as http:
        while not pending.done():
            peak = max(peak, num_running((await http.get(f"{url}/metrics")).text))
            await asyncio.sleep(0.5)
    results = await pending
    idle = await seconds_until_idle(url, IDLE_LIMIT_SECONDS)
    whole = [result for result in results if not result.cut]
    gaps = [gap for result in whole for gap in result.gaps_seconds]
    first = [result.first_token_seconds for result in whole if result.first_token_seconds is not None]
    return {
        "num_streams": num_streams,
        "num_cut": sum(result.cut for result in results),
        "num_completed": sum(result.error is None and result.finish_reason == "length" for result in whole),
        "num_expected": len(whole),
        "errors": sorted({result.error for result in results if result.error}),
        "peak_running": peak,
        "idle_after_seconds": None if idle is None else round(idle, 3),
        "idle_within_limit": idle is not None,
        "first_token_p50_seconds": percentile(first, 50),
        "first_token_p95_seconds": percentile(first, 95),
        "between_tokens_p50_seconds": percentile(gaps, 50),
        "between_tokens_p95_seconds": percentile(gaps, 95),
    }


@contextlib.contextmanager
def served(url: str | None, port: int) -> Iterator[str]:
    """The server named, or one of our own for as long as it is needed."""
    if url is not None:
        yield url.rstrip("/")
        return
    from sparkray.config import ClusterConfig, ServeConfig
    from sparkray.serving.lifecycle import down, up

    name = f"serve-load-{port}"
    session = up(ServeConfig(port=port), ClusterConfig(), name=name, say=lambda line: print(line, file=sys.stderr))
    try:
        yield str(session.serve_url)
    finally:
        down(name)


def main() -> int:
    """Parse, run, print; exits 1 where a stream failed or the engine stayed busy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url")
    parser.add_argument("--port", type=int, default=8031, help="port of the server that is started for the run")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--cut", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with served(options.url, options.port) as url:
        report = asyncio.run(run(url, num_streams=options.streams, num_cut=options.cut, num_tokens=options.tokens))
    if not options.json:
        for key, value in report.items():
            print(f"{key:28} {value}")
    print(json.dumps(report))
    return 0 if report["num_completed"] == report["num_expected"] and report["idle_within_limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
