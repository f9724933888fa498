"""Verification: answers handed off against the same engine's answers alone, token by token.

In float32 with equal weights they must be equal. In lower precision two engines part where their two likeliest tokens
are as close as their noise, so there the first difference, its margin, and the divergence from the decode engine's own
prefill are reported instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparkray.handoff.client import Peer
from sparkray.handoff.compare import first_difference
from sparkray.handoff.handing import Ask, Prefiller, Told, answer, collect, pair

# KL is measured by forcing tokens through both caches; more prompts than this add nothing to its mean.
_DIVERGENCE_PROMPTS = 3


async def verify(
    prefiller: Prefiller,
    peers: Mapping[str, Peer],
    prompts: Sequence[list[int]],
    max_tokens: int,
    *,
    exact: bool,
    timeout_seconds: float = 300.0,
    on_row: Callable[[str, Mapping[str, Any]], None] = lambda name, row: None,
) -> dict[str, Any]:
    """Run every prompt alone and over each peer.

    Args:
        prefiller: the prefill side; its own greedy answers are the reference.
        peers: decode peers by name.
        prompts: token ids.
        max_tokens: of each answer.
        exact: whether tokens must be equal; else peers are also compared with their own prefill.
        timeout_seconds: longest silence of a peer.
        on_row: told of each prompt as it is done, with the peer's name.

    Returns:
        The report; `ok` says whether everything came over the wire (`full`) and, where exact, agreed.
    """
    alone, margins = [], []
    for prompt in prompts:
        generated = [each async for each in prefiller.generate(prompt, max_tokens)]
        alone.append([token for token, _ in generated])
        margins.append([margin for _, margin in generated])
    engines: dict[str, Any] = {}
    for name, peer in peers.items():
        canary = (await pair(peer, prefiller, timeout_seconds)).report
        rows = []
        for index, prompt in enumerate(prompts):
            row = await _compare(prefiller, peer, prompt, alone[index], margins[index], timeout_seconds)
            if not exact:
                row |= await _against_own(peer, prompt, alone[index], row.pop("tokens"), timeout_seconds)
                if index < _DIVERGENCE_PROMPTS:
                    row |= await _divergence(prefiller, peer, prompt, timeout_seconds)
            row.pop("tokens", None)
            rows.append(row)
            on_row(name, row)
        matched = sum(row["matched"] for row in rows)
        engines[name] = {
            "token_match": matched / sum(map(len, alone)),
            "num_prompts": len(rows),
            "num_full": sum(row["verdict"] == "full" for row in rows),
            "canary": canary,
            "prompts": rows,
        }
        if not exact:
            divergences = [row["kl"] for row in rows if "kl" in row]
            engines[name]["kl_mean"] = sum(divergences) / len(divergences)
            engines[name]["own_match"] = sum(row["own_matched"] for row in rows) / sum(map(len, alone))
            engines[name]["noise_match"] = sum(row["noise_matched"] for row in rows) / sum(map(len, alone))
    match = min(engine["token_match"] for engine in engines.values())
    full = all(engine["num_full"] == engine["num_prompts"] for engine in engines.values())
    return {
        "ok": full and (match == 1.0 or not exact),
        "exact": exact,
        "token_match": match,
        "num_prompts": len(prompts),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "engines": engines,
    }


async def _compare(
    prefiller: Prefiller,
    peer: Peer,
    prompt: list[int],
    alone: list[int],
    margins: list[float],
    timeout_seconds: float,
) -> dict[str, Any]:
    told = Told()
    ask = Ask(tuple(prompt), len(alone), timeout_seconds=timeout_seconds)
    began = time.time()
    await collect(answer(peer, ask, prefiller, told), told)
    assert told.done is not None
    differs = first_difference(told.tokens, alone)
    times = told.done.times
    return {
        "prompt_tokens": len(prompt),
        "matched": len(alone) if differs is None else differs,
        "first_difference": differs,
        "margin_there": None if differs is None else margins[differs],
        "verdict": told.done.verdict,
        "reason": told.done.reason,
        "kv_bytes": told.done.kv_bytes,
        "prefill_seconds": told.prefill_ended_at - began,
        "first_token_after_prefill_seconds": times["started_at"] + times["first_token"] - told.prefill_ended_at,
        "tokens": told.tokens,
    }


async def _against_own(
    peer: Peer, prompt: list[int], alone: list[int], handed: list[int], timeout_seconds: float
) -> dict[str, Any]:
    """The peer's answer from its own prefill: against the handed one, and against the prefill side's (the noise)."""
    told = Told()
    ask = Ask(tuple(prompt), len(alone), timeout_seconds=timeout_seconds)
    await collect(answer(peer, ask, None, told), told)
    own, noise = first_difference(handed, told.tokens), first_difference(told.tokens, alone)
    return {
        "own_first_difference": own,
        "own_matched": len(alone) if own is None else own,
        "own_margin_there": None if own is None else told.margins[own],
        "noise_first_difference": noise,
        "noise_matched": len(alone) if noise is None else noise,
    }


async def _divergence(prefiller: Prefiller, peer: Peer, prompt: list[int], timeout_seconds: float) -> dict[str, Any]:
    told = Told()
    ask = Ask(tuple(prompt), 1, timeout_seconds=timeout_seconds)
    await collect(answer(peer, ask, prefiller, told, purpose="canary"), told)
    assert told.done is not None
    report = told.done.report
    return {"kl": report["kl"], "keys_error": report["keys_error"], "values_error": report["values_error"]}
