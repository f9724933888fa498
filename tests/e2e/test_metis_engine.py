"""24 requests at once on a real engine that is short of memory, each trace against a float64 recomputation.

The engine reads prompts in pieces, preempts and resumes; the clients sample in different ways, take their tokens in
different ways, and some leave. Transformers then reads the very tokens that were delivered, in float64, and what the
engine recorded must be the entropy before each of them.

float32: every token agrees within 1e-3 bits.

bfloat16: the model's own rounding is larger than any error of METIS. The likeliest logits are above 16, where bfloat16
has steps of 1/8: rounding float64 logits once already moves entropies by up to 0.09 bits, and 30 layers add their
own, so no two bfloat16 programs agree within 0.02 bits token by token (transformers' own bfloat16 is as far from
float64 as the engine is). Three statements are possible, and all are tested:

1. against float64 arithmetic on the very logits that the engine sampled from, every token agrees within 1e-3 bits
   (the engine hands them out for some requests of the same crowd);
2. against the float64 model, the mean over all tokens agrees within 0.02 bits: rounding has no direction;
3. against the float64 model, the engine's entropies are off by no more than those of transformers in bfloat16.

Shapes: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("vllm")

import torch
from live_engine import MAX_STEP_TOKENS, LiveEngine, live_engine
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sparkray.errors import NotFoundError
from sparkray.metis.fields import COLUMN

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

FLOAT32_BITS = 1e-3
BFLOAT16_BITS = 0.02

DoubleArray = NDArray[np.float64]

TEXT = (
    "The history of the old lighthouse on the northern coast began in a cold winter, when the fishermen of three "
    "villages asked the council for a light. Nobody wanted to pay for it. The council wrote letters for two years, "
    "the fishermen lost four boats, and in the end a widow gave the money under one condition: that the keeper be "
    "a woman, and that she be paid as much as the captain of the ferry. So it was done. "
)
PUBLISHED = {"metis_hedge": 0.5, "metis_drift": 0.1, "metis_boost": "published"}
CAREFUL = {"metis_hedge": 0.5, "metis_drift": 0.1, "metis_boost": "careful"}
UNWATCHED = {"metis": False}
# How tokens are drawn, request by request.
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 50},
    {"temperature": 0.0, "presence_penalty": 1.0},
    {"temperature": 0.5, "min_p": 0.05},
    {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2},
)


@dataclass
class Case:
    """A client: what it asks for, when it leaves, and what it got.

    Attributes:
        leaves_after: tokens after which it goes away, or None.
        aborts_after: tokens after which it asks the engine to stop, or None.
        logprobs_TV: of the logits that the tokens were drawn from, where it asked for them.
    """

    name: str
    prompt_ids: list[int]
    params: SamplingParams
    leaves_after: int | None = None
    aborts_after: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs_TV: list[DoubleArray] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def watched(self) -> bool:
        return self.params.extra_args != UNWATCHED


def crowd(prompt_ids: Sequence[int], label: str, *, with_logits: bool) -> list[Case]:
    """24 clients. With logits, three of them ask for those.

    Every third prompt is longer than a step has room for; the others are short, so that many requests begin and then
    outgrow the cache together.
    """
    cases = []
    for number in range(24):
        xargs: dict[str, Any] | None = (None, {"metis": True}, PUBLISHED, UNWATCHED, CAREFUL, {})[number * 5 % 6]
        hands_out_logits = with_logits and number in (4, 13, 22)
        kind = (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)[number % 3]
        leaves = number in (2, 9, 16)
        aborts = number in (5, 20)
        params = SamplingParams(
            **SAMPLING[number % len(SAMPLING)],
            extra_args=xargs,
            # Long where it is to be cut: on a busy machine a client may be many tokens behind the engine.
            max_tokens=10 if hands_out_logits else 60 if leaves or aborts else 20 + number,
            ignore_eos=leaves or aborts or number % 4 != 0,
            logprobs=-1 if hands_out_logits else None,
            flat_logprobs=hands_out_logits,
            output_kind=RequestOutputKind.DELTA if leaves or aborts else kind,
        )
        length = 70 + number if number % 3 == 2 else 3 + number
        # All begin differently, so that none finds its prompt in the prefix cache.
        start = 7 * number % (len(prompt_ids) - length)
        cases.append(
            Case(
                f"{label}-{number}",
                list(prompt_ids[start : start + length]),
                params,
                leaves_after=number if leaves else None,
                aborts_after=8 if aborts else None,
            )
        )
    return cases


async def drive(live: LiveEngine, cases: Sequence[Case]) -> None:
    """Half of the clients come at once, the others when the first has had a few tokens."""
    busy = asyncio.Event()

    async def client(number: int, case: Case) -> None:
        if number % 2:
            await busy.wait()
        prompt = {"prompt_token_ids": case.prompt_ids}
        async with aclosing(live.engine.generate(prompt, case.params, case.name)) as outputs:
            async for output in outputs:
                take(case, output.outputs[0])
                if case.aborts_after is not None and len(case.token_ids) >= case.aborts_after:
                    await live.engine.abort(case.name)
                    case.aborts_after = None
                if case.leaves_after is not None and len(case.token_ids) >= case.leaves_after:
                    break
                if number == 0 and len(case.token_ids) >= 3:
                    busy.set()
        busy.set()

    await asyncio.gather(*(client(number, case) for number, case in enumerate(cases)))


def take(case: Case, answer: Any) -> None:
    """Note what one output brought."""
    known = 0 if case.params.output_kind is RequestOutputKind.DELTA else len(case.token_ids)
    case.token_ids += answer.token_ids[known:]
    case.finish_reason = answer.finish_reason
    if answer.logprobs is None:
        return
    given = answer.logprobs
    for start, stop in list(zip(given.start_indices, given.end_indices, strict=True))[known:]:
        # The drawn token comes first, and again at its place in the order.
        values, ids = np.array(given.logprobs[start + 1 : stop]), np.array(given.token_ids[start + 1 : stop])
        ordered = np.empty(len(ids))
        ordered[ids] = values
        case.logprobs_TV.append(ordered)


def entropy_bits(logprobs_TV: torch.Tensor) -> DoubleArray:
    """-sum p log2 p in float64."""
    logprobs_TV = torch.log_softmax(logprobs_TV.double(), dim=-1)
    entropies: DoubleArray = (-(logprobs_TV.exp() * logprobs_TV).sum(-1) / math.log(2)).numpy()
    return entropies


@dataclass
class Reference:
    """Transformers, reading what was written."""

    model: Any

    def logits(self, case: Case) -> torch.Tensor:
        num_tokens = len(case.token_ids)
        ids = torch.tensor([case.prompt_ids + case.token_ids])
        with torch.inference_mode():
            logits = self.model(ids, logits_to_keep=num_tokens + 1, use_cache=False).logits[0, :-1]
        assert logits.shape[0] == num_tokens
        return logits


def load(path: str, dtype: torch.dtype) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


@pytest.fixture(scope="module")
def float64_model(embedded_path: str) -> Reference:
    return load(embedded_path, torch.float64)


@pytest.fixture(scope="module")
def prompt_ids(embedded_path: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(embedded_path)(TEXT * 3)["input_ids"])


@pytest.fixture(scope="module")
def bfloat16_crowd(engine: LiveEngine, prompt_ids: list[int]) -> list[Case]:
    return served(engine, crowd(prompt_ids, "bfloat16", with_logits=True))


def served(live: LiveEngine, cases: list[Case]) -> list[Case]:
    """Serve the crowd, and prove by the engine's statistics that it had the trouble it was meant to have."""
    steps = live.steps
    before = steps.num_preemptions, steps.num_prompt_rows, len(steps.step_tokens)
    live.run(drive(live, cases))
    num_preemptions = steps.num_preemptions - before[0]
    num_pieces = steps.num_prompt_rows - before[1] - len(cases)
    assert num_preemptions >= 3
    # A request that is preempted before its first token is read again; what is beyond that are pieces.
    assert num_pieces - num_preemptions >= 8
    assert max(steps.step_tokens[before[2] :]) <= MAX_STEP_TOKENS
    assert "abort" in {case.finish_reason for case in cases}
    assert live.engine.num_active_traces == 0
    return cases


def recorded(live: LiveEngine, case: Case) -> NDArray[np.float32]:
    """The trace's numbers, after what must be true of every trace."""
    entry = live.engine.traces.get(case.name)
    assert entry.token_ids == case.token_ids
    tokens_TF = entry.tokens()
    assert len(tokens_TF) == len(case.token_ids) > 0
    assert np.isfinite(tokens_TF).all()
    assert entry.restarts == 0
    assert entry.finish_reason == (case.finish_reason or "abort")
    if case.leaves_after is None and case.finish_reason == "length":
        assert len(tokens_TF) == case.params.max_tokens
    return tokens_TF


def own_z(entropies_T: NDArray[np.float32]) -> DoubleArray:
    """Each entropy against all up to it. A token counted twice or not at all would show from there on."""
    scores = []
    for stop in range(1, len(entropies_T) + 1):
        so_far = entropies_T[:stop].astype(np.float64)
        std = so_far.std(ddof=1) if stop > 1 else 0.1
        scores.append((so_far[-1] - so_far.mean()) / std if std > 0.01 else 0.0)
    return np.array(scores)


def check_counts(live: LiveEngine, cases: Sequence[Case]) -> None:
    for case in cases:
        if not case.watched:
            assert len(case.token_ids) > 0
            with pytest.raises(NotFoundError):
                live.engine.traces.get(case.name)
            continue
        tokens_TF = recorded(live, case)
        entropies = tokens_TF[:, COLUMN["entropy"]]
        np.testing.assert_allclose(tokens_TF[:, COLUMN["z"]], own_z(entropies), rtol=0, atol=2e-3, err_msg=case.name)
    boosted = [case for case in cases if case.watched and recorded(live, case)[:, COLUMN["boosted"]].any()]
    # The careful kind waits for the end of a sentence, which may not come.
    assert "published" in {case.params.extra_args["metis_boost"] for case in boosted}


def recorded_entropies(live: LiveEngine, cases: Sequence[Case]) -> list[DoubleArray]:
    return [recorded(live, case)[:, COLUMN["entropy"]].astype(np.float64) for case in cases]


def test_float32_traces_equal_a_float64_recomputation(
    embedded_path: str, float64_model: Reference, prompt_ids: list[int]
) -> None:
    with live_engine(embedded_path, "float32", enable_prefix_caching=False) as live:
        cases = served(live, crowd(prompt_ids, "float32", with_logits=False))
        check_counts(live, cases)
        watched = [case for case in cases if case.watched]
        assert len(watched) == 20
        for case in watched:
            logits_TV = float64_model.logits(case)
            tokens_TF = recorded(live, case)
            entropies_T, top_T = entropy_bits(logits_TV), logits_TV.softmax(-1).amax(-1).numpy()
            np.testing.assert_allclose(
                tokens_TF[:, COLUMN["entropy"]], entropies_T, rtol=0, atol=FLOAT32_BITS, err_msg=case.name
            )
            np.testing.assert_allclose(tokens_TF[:, COLUMN["max_prob"]], top_T, rtol=0, atol=1e-4)


def test_bfloat16_every_token_is_counted_once(engine: LiveEngine, bfloat16_crowd: list[Case]) -> None:
    check_counts(engine, bfloat16_crowd)


def test_bfloat16_traces_equal_float64_arithmetic_on_the_logits_sampled_from(
    engine: LiveEngine, bfloat16_crowd: list[Case]
) -> None:
    num_tokens = 0
    for case in bfloat16_crowd:
        if case.watched and case.logprobs_TV:
            expected_T = entropy_bits(torch.from_numpy(np.stack(case.logprobs_TV)))
            entropies_T = recorded(engine, case)[:, COLUMN["entropy"]]
            np.testing.assert_allclose(entropies_T, expected_T, rtol=0, atol=FLOAT32_BITS, err_msg=case.name)
            num_tokens += len(expected_T)
    assert num_tokens == 30


def test_bfloat16_differs_from_float64_by_no_more_than_the_rounding_of_the_model(
    engine: LiveEngine, bfloat16_crowd: list[Case], float64_model: Reference, embedded_path: str
) -> None:
    watched = [case for case in bfloat16_crowd if case.watched]
    assert len(watched) == 20
    bfloat16_model = load(embedded_path, torch.bfloat16)
    exact = np.concatenate([entropy_bits(float64_model.logits(case)) for case in watched])
    ours = np.concatenate(recorded_entropies(engine, watched)) - exact
    theirs = np.concatenate([entropy_bits(bfloat16_model.logits(case)) for case in watched]) - exact
    for name, off in (("engine", ours), ("transformers", theirs)):
        sizes = np.abs(off)
        print(f"{name}: {len(off)} tokens, off by {off.mean():.4f} bits in the mean,", end=" ")
        print(f"{np.median(sizes):.4f} in the median, {sizes.max():.3f} at most")
    assert abs(ours.mean()) <= BFLOAT16_BITS
    assert np.median(np.abs(ours)) <= 1.25 * np.median(np.abs(theirs))
    assert np.quantile(np.abs(ours), 0.9) <= 1.5 * np.quantile(np.abs(theirs), 0.9)
