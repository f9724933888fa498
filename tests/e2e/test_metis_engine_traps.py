"""Traps of `test_metis_traps` that show themselves on a running engine only; a few tokens each."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from live_engine import LiveEngine
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from sparkray.metis.fields import COLUMN
from sparkray.metis.vllm_engine import RejectedRequestError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT = "The capital of France is"


def ask(live: LiveEngine, name: str, params: SamplingParams) -> RequestOutput:
    async def last() -> RequestOutput:
        params.output_kind = RequestOutputKind.FINAL_ONLY
        [output] = [output async for output in live.engine.generate(PROMPT, params, name)]
        return output

    return live.run(last())


def recorded(live: LiveEngine, name: str, column: str) -> list[float]:
    values: list[float] = live.engine.traces.get(name).tokens()[:, COLUMN[column]].tolist()
    return values


def test_trap_01_entropy_does_not_depend_on_the_temperature(engine: LiveEngine) -> None:
    first = []
    for number, temperature in enumerate((0.0, 0.5, 1.0, 2.0)):
        name = f"trap-01-{number}"
        ask(engine, name, SamplingParams(temperature=temperature, max_tokens=1))
        first += recorded(engine, name, "entropy")
    assert len(first) == 4
    # The batch differs, and with it the rounding of bfloat16.
    assert first == pytest.approx([first[0]] * 4, abs=0.15)
    assert first[0] > 0.5


def test_trap_05_several_answers_are_refused_and_go_unwatched_where_nothing_was_asked(engine: LiveEngine) -> None:
    with pytest.raises(RejectedRequestError, match="Send n requests instead"):
        engine.engine.generate(PROMPT, SamplingParams(n=2, extra_args={"metis": True}), "trap-05")
    output = ask(engine, "trap-05-quiet", SamplingParams(n=2, temperature=1.0, max_tokens=3, ignore_eos=True))
    assert [len(answer.token_ids) for answer in output.outputs] == [3, 3]
    entry = engine.engine.traces.get("trap-05-quiet")
    assert entry.note == "not recorded: several answers were asked for in one request"
    assert len(entry.tokens()) == 0


def test_trap_06_under_a_grammar_the_entropy_is_that_of_what_is_allowed(engine: LiveEngine) -> None:
    params = SamplingParams(
        temperature=1.0, max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["A", "B"])
    )
    output = ask(engine, "trap-06", params)
    assert output.outputs[0].text in ("A", "B")
    entropies = recorded(engine, "trap-06", "entropy")
    assert len(entropies) == len(output.outputs[0].token_ids)
    # Two letters are allowed first, and nothing but the end after either.
    assert 0 <= entropies[0] <= 1
    assert entropies[1:] == pytest.approx([0.0] * (len(entropies) - 1), abs=1e-4)
    assert recorded(engine, "trap-06", "max_prob")[0] >= 0.5


def test_trap_07_a_boosted_token_keeps_the_probability_that_the_model_gave_it(engine: LiveEngine) -> None:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=16,
        ignore_eos=True,
        logprobs=1,
        extra_args={
            "metis_hedge": 0.2,
            "metis_drift": 0.01,
            "metis_boost": "published",
            "metis_boost_bonus": 40.0,
        },
    )
    answer = ask(engine, "trap-07", params).outputs[0]
    boosted = recorded(engine, "trap-07", "boosted")
    top = recorded(engine, "trap-07", "max_prob")
    assert 1.0 in boosted
    assert answer.logprobs is not None
    forced = 0
    for flag, probability, choices in zip(boosted, top, answer.logprobs, strict=True):
        ranks = {choice.rank: choice.logprob for choice in choices.values()}
        assert 2.718281828 ** ranks[1] == pytest.approx(probability, abs=1e-3)
        forced += bool(flag) and max(ranks) > 1
    assert forced > 0


def test_trap_09_a_seed_is_refused_and_the_engine_goes_on(engine: LiveEngine) -> None:
    with pytest.raises(RejectedRequestError, match="cannot combine it with prompts read in pieces"):
        engine.engine.generate(PROMPT, SamplingParams(seed=1, max_tokens=4), "trap-09")
    assert len(ask(engine, "trap-09-after", SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids) == 4


def test_trap_12_an_empty_mapping_says_nothing_and_the_servers_default_holds(engine: LiveEngine) -> None:
    ask(engine, "trap-12", SamplingParams(max_tokens=2, ignore_eos=True, extra_args={}))
    assert len(recorded(engine, "trap-12", "entropy")) == 2


def test_after_all_of_it_no_slot_is_held(engine: LiveEngine) -> None:
    assert engine.engine.num_active_traces == 0
