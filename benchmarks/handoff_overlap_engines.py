"""The engines' part of `handoff_overlap.py`, which starts this in the prefill side's namespace; it is not run alone.

Reads lines `goodput bytes_per_second` from standard input, one for each state of the cable, the unshaped one (0) first,
and answers each with a line of JSON: from the end of prefill to the first token, measured and predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# Before vLLM is imported: standard output is for the result, and a namespace has no address of the outside.
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from sparkray.config.handoff import LinkRates, MachineRates, ModelShape, PrefillConfig
from sparkray.handoff.client import Peer
from sparkray.handoff.handing import Ask, Told, answer, collect, pair
from sparkray.handoff.plan import Work, handoff_times, shape_of_identity
from sparkray.handoff.probe_text import prompts_of
from sparkray.handoff.vllm_prefill import PrefillEngine

PROMPT_TOKENS = 1087
CHUNK_TOKENS = 256


async def hand(prefiller: PrefillEngine, peer: Peer, prompt: list[int]) -> dict[str, float]:
    """One request: seconds of its prefill, and from there to the first token."""
    told, began = Told(), time.time()
    await collect(answer(peer, Ask(tuple(prompt), 2), prefiller, told), told)
    assert told.done is not None
    if told.done.verdict != "full":
        raise SystemExit(f"a run was {told.done.verdict} ({told.done.reason}); such a run is not counted")
    times = told.done.times
    return {
        "prefill_seconds": told.prefill_ended_at - began,
        "first_token_after_prefill_seconds": times["started_at"] + times["first_token"] - told.prefill_ended_at,
        "kv_bytes": float(told.done.kv_bytes),
    }


def predict(shape: ModelShape, seen: dict[str, float], goodput: float, unshaped_seconds: float) -> dict[str, float]:
    """What the cost model says of one link: its exposed time, and the rest as the unshaped cable showed it."""
    rates = MachineRates(
        name="here", source="measured", prefill_tokens_per_second=PROMPT_TOKENS / seen["prefill_seconds"],
        decode_tokens_per_second=1e9,
    )  # fmt: skip
    last_frame = CHUNK_TOKENS * shape.kv_bytes_per_token / shape.num_layers
    link = LinkRates(bytes_per_second=goodput, rtt_seconds=0.0002, last_frame_bytes=last_frame)
    handed = handoff_times(shape, rates, rates, link, Work(PROMPT_TOKENS, 1))
    wire = handed.kv_bytes / goodput
    exposed = max(0.0, seen["first_token_after_prefill_seconds"] - unshaped_seconds)
    return {
        "predicted_first_token_after_prefill_seconds": handed.exposed_seconds + unshaped_seconds,
        "hidden_share": max(0.0, 1 - exposed / wire),
        "predicted_hidden_share": handed.hidden_share,
    }


async def answer_lines(peer: Peer, rounds: int) -> None:
    """Measure once for each line that comes."""
    prefiller = PrefillEngine(
        PrefillConfig(codec="raw", chunk_tokens=CHUNK_TOKENS, max_model_len=PROMPT_TOKENS + 64, prefix_caching=False)
    )
    try:
        await pair(peer, prefiller)
        prompts = prompts_of(prefiller.folder, prefiller.vocabulary, (PROMPT_TOKENS,) * rounds)
        shape = shape_of_identity(prefiller.identity, "float32")
        await hand(prefiller, peer, prompts[0])
        unshaped_seconds = 0.0
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            goodput = float(line.split()[1])
            rows = [await hand(prefiller, peer, prompt) for prompt in prompts]
            seen: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            if goodput:
                seen |= predict(shape, seen, goodput, unshaped_seconds)
            else:
                unshaped_seconds = seen["first_token_after_prefill_seconds"]
            print(json.dumps(seen), flush=True)
    finally:
        prefiller.close()


def main() -> None:
    """Run until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    asyncio.run(answer_lines(Peer(arguments.peer, arguments.secret_file.read_bytes()), arguments.rounds))


if __name__ == "__main__":
    main()
