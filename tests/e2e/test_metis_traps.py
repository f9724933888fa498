"""What goes wrong with processors in vLLM, each in a test of its number.

Those that need an engine to show are in `test_metis_engine.py`; here vLLM's own classes are driven without one.

| trap | here | on the engine |
|---|---|---|
| 1 an argmax-invariant processor misses greedy requests and sees scaled logits | flag | yes |
| 2 pieces of a prompt are observed as tokens | V1 and V2 classes | yes |
| 3 a preempted request comes back as a new one | V1 and V2 classes | yes |
| 4 rows move without a removal | V1 batch class | - |
| 5 the answers of n > 1 share their switches | validation | yes |
| 6 a grammar forbids most tokens | -inf rows in all lives | yes |
| 7 a boosted token's own probability says nothing of the model | boosted column | yes |
| 8 V1, speculation and a processor do not start | refusal before | - |
| 9 a seed and pieces of a prompt end a CPU engine | refusal | yes |
| 10 async scheduling: tokens are placeholders for a while | V1 batch class (a CPU engine never does it) | flag |
| 11 every tensor-parallel rank samples | two processors side by side (no two ranks on one CPU) | - |
| 12 an empty mapping of switches is not a request to watch | validation | yes |
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from batch_simulation import CAREFUL_SWITCHES, NUM_ROWS, SWITCHES, VOCAB, Letters, V1Life, V2Life, vllm_config
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessors,
    MoveDirectionality,
    _load_logitsprocs_by_fqcns,
    validate_logits_processors_parameters,
)
from vllm.v1.worker.gpu.sample.logits_processor.loader import (
    _load_v2_logitsprocs_by_fqcns,
    build_custom_logits_processors_params_validator,
)

from sparkray.config.metis import MetisConfig
from sparkray.errors import UnavailableError, UsageError
from sparkray.metis import vllm_processor
from sparkray.metis.arena import TraceArena
from sparkray.metis.fields import COLUMN
from sparkray.metis.vllm_engine import RejectedRequestError, WatchedEngine, prepare
from sparkray.metis.vllm_processor import PROCESSOR, MetisLogitsProcessor

CPU = torch.device("cpu")
NUM_STEPS = 60


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that needs no compiling, and a tokenizer that needs no model."""
    monkeypatch.setattr(vllm_processor, "warm_up", lambda *_: False)
    monkeypatch.setattr(vllm_processor, "cached_tokenizer_from_config", lambda _: Letters())


@contextmanager
def new_arena() -> Iterator[TraceArena]:
    with TemporaryDirectory() as folder:
        made = TraceArena.create(64, 128, Path(folder))
        yield made
        made.close()


@pytest.fixture
def arena() -> Iterator[TraceArena]:
    with new_arena() as made:
        yield made


def processor_of(arena: TraceArena | None, **config: int) -> MetisLogitsProcessor:
    return MetisLogitsProcessor(vllm_config(arena.path if arena else None, **config), CPU, is_pin_memory=False)


def watched(**xargs: object) -> SamplingParams:
    return SamplingParams(temperature=1.0, extra_args={"metis": True, **xargs})


def added(row: int, params: SamplingParams, output: list[int]) -> BatchUpdate:
    return BatchUpdate(batch_size=row + 1, removed=[], added=[(row, params, [1, 2], output)], moved=[])


def play(life: V1Life | V2Life, **how: bool) -> None:
    for _ in range(NUM_STEPS):
        if len(life.waiting) < 6 and life.chance.random() < 0.5:
            life.birth()
        life.step(**how)
    for request in (*life.running, *life.waiting):
        life.end(request)
    assert life.arena.num_active == 0
    assert sum(len(request.output) for request in life.ended) > NUM_STEPS


slow_ok = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
seeds = st.integers(0, 2**32)


def test_one_class_loads_under_both_runners() -> None:
    assert _load_logitsprocs_by_fqcns([PROCESSOR]) == [MetisLogitsProcessor]
    assert _load_v2_logitsprocs_by_fqcns([PROCESSOR]) == [MetisLogitsProcessor]


def test_trap_01_never_argmax_invariant(arena: TraceArena) -> None:
    processor = processor_of(arena)
    sorted_in = LogitsProcessors([processor])
    assert (sorted_in.argmax_invariant, sorted_in.non_argmax_invariant) == ([], [processor])


@slow_ok
@given(seeds)
def test_traps_02_03_04_06_any_life_in_the_v1_batch(seed: int) -> None:
    """Pieces of prompts, preemption and return, moves and swaps, forbidden tokens, both boosts, in vLLM's own batch."""
    with new_arena() as arena:
        play(V1Life(arena, random.Random(seed)))


@slow_ok
@given(seeds, st.sampled_from([0, 3]))
def test_traps_02_03_06_any_life_in_v2_places(seed: int, max_drafts: int) -> None:
    """The same under the V2 interface, with and without drafts, through vLLM's own context class.

    V2 itself needs a GPU, so positions and places are made here as its runner makes them.
    """
    with new_arena() as arena:
        play(V2Life(arena, random.Random(seed), max_drafts=max_drafts))


def test_trap_02_a_prompt_in_pieces_counts_for_nothing(arena: TraceArena) -> None:
    slot = arena.claim()
    processor, output = processor_of(arena), []
    params = watched(metis_slot=slot.index, metis_generation=slot.generation)
    processor.update_state(added(0, params, output))
    flat, peaked = torch.zeros(1, VOCAB), torch.zeros(1, VOCAB)
    peaked[0, 3] = 50.0
    for _ in range(4):
        processor.apply(flat.clone())
    processor.apply(peaked.clone())
    output.append(3)
    processor.apply(flat.clone())
    recorded = arena.read(slot, 0, 2)
    assert recorded[:, COLUMN["entropy"]].tolist() == pytest.approx([0.0, 5.584963], abs=1e-5)
    # Two tokens, 0 and log2(48) bits: z of the second against both is half the range over the deviation.
    assert recorded[1, COLUMN["z"]] == pytest.approx(0.5**0.5, abs=1e-4)
    assert arena.progress(slot).written == 2


def test_trap_04_a_move_with_nothing_in_removed(arena: TraceArena) -> None:
    slots = [arena.claim() for _ in range(3)]
    params = [watched(metis_slot=slot.index, metis_generation=slot.generation) for slot in slots]
    outputs: list[list[int]] = [[], [], []]
    processor = processor_of(arena)
    processor.update_state(
        BatchUpdate(3, removed=[], added=[(row, params[row], [1], outputs[row]) for row in range(3)], moved=[])
    )
    processor.apply(torch.zeros(3, VOCAB))
    for output in outputs:
        output.append(1)
    # The request of row 0 has ended; that of row 2 takes its place, and vLLM says no more than this.
    processor.update_state(BatchUpdate(2, removed=[], added=[], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    peaked = torch.zeros(2, VOCAB)
    peaked[0, 5] = 50.0
    processor.apply(peaked)
    assert arena.progress(slots[0]).written == 1
    assert arena.read(slots[2], 1, 2)[0, COLUMN["entropy"]] == pytest.approx(0.0, abs=1e-5)
    assert arena.read(slots[1], 1, 2)[0, COLUMN["entropy"]] == pytest.approx(5.584963, abs=1e-5)
    assert arena.progress(slots[2]).restarts == 0


@pytest.mark.parametrize("xargs", [{"metis": True}, {"metis_detector": "metis"}])
def test_trap_05_several_answers_are_refused_by_both_validators(xargs: dict[str, object]) -> None:
    params = SamplingParams(n=3, extra_args=xargs)
    for validate in (
        lambda given: validate_logits_processors_parameters([PROCESSOR], given),
        build_custom_logits_processors_params_validator([PROCESSOR]),
    ):
        with pytest.raises(VLLMValidationError, match="Send n requests instead"):
            validate(params)
        validate(SamplingParams(n=3))


def test_trap_06_a_boost_does_not_lift_what_is_forbidden(arena: TraceArena) -> None:
    slot = arena.claim()
    processor, output = processor_of(arena), []
    xargs = {"metis_hedge": 0.01, "metis_drift": 0.0, "metis_boost": "published"}
    processor.update_state(added(0, watched(**xargs, metis_slot=slot.index, metis_generation=slot.generation), output))
    for step in range(6):
        logits = torch.full((1, VOCAB), -torch.inf)
        logits[0, : 1 + 4 * step] = 0.0
        forbidden = torch.isinf(logits)
        seen = processor.apply(logits)
        assert torch.equal(torch.isinf(seen), forbidden)
        output.append(0)
    recorded = arena.read(slot, 0, 6)
    assert recorded[:, COLUMN["boosted"]].any()
    expected = torch.tensor([1.0 + 4 * step for step in range(6)]).log2()
    assert recorded[:, COLUMN["entropy"]].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_trap_07_a_boosted_token_is_flagged_and_its_numbers_are_the_models(arena: TraceArena) -> None:
    slot = arena.claim()
    processor, output = processor_of(arena), []
    xargs = {"metis_hedge": 0.01, "metis_drift": 0.0, "metis_boost": "published"}
    processor.update_state(added(0, watched(**xargs, metis_slot=slot.index, metis_generation=slot.generation), output))
    boosted = []
    for step in range(8):
        logits = torch.zeros(1, VOCAB)
        logits[0, 0] = 8.0 - 2 * (step % 4)
        raw = logits.clone()
        seen = processor.apply(logits)
        boosted.append(not torch.equal(raw, seen))
        recorded = arena.read(slot, step, step + 1)[0]
        assert recorded[COLUMN["max_prob"]] == pytest.approx(raw.softmax(-1).max().item(), abs=1e-6)
        output.append(0)
    assert True in boosted
    assert False in boosted
    assert arena.read(slot, 0, 8)[:, COLUMN["boosted"]].tolist() == boosted


def test_who_is_not_watched_inherits_no_boost_from_the_row(arena: TraceArena) -> None:
    slots = [arena.claim() for _ in range(2)]
    xargs = {"metis_hedge": 0.01, "metis_drift": 0.0, "metis_boost": "published"}
    params = [watched(**xargs, metis_slot=slot.index, metis_generation=slot.generation) for slot in slots]
    outputs: list[list[int]] = [[], []]
    processor = processor_of(arena)
    processor.update_state(BatchUpdate(2, [], [(row, params[row], [1], outputs[row]) for row in range(2)], []))
    for step in range(8):
        logits = torch.zeros(2, VOCAB)
        logits[:, 0] = 8.0 - step
        processor.apply(logits)
        for output in outputs:
            output.append(0)
    assert arena.read(slots[0], 7, 8)[0, COLUMN["boosted"]] == 1
    processor.update_state(BatchUpdate(2, [], [(0, SamplingParams(), [1], [])], []))
    seen = processor.apply(torch.zeros(2, VOCAB))
    assert torch.equal(seen[0], torch.zeros(VOCAB))
    assert seen[1].any()


def config_for_prepare(**overrides: object) -> SimpleNamespace:
    values = {
        "model_config": SimpleNamespace(
            runner_type="generate", model="tiny", max_model_len=32, logits_processors=[PROCESSOR]
        ),
        "scheduler_config": SimpleNamespace(max_num_seqs=NUM_ROWS),
        "speculative_config": None,
        "use_v2_model_runner": False,
        "additional_config": {"theirs": 1},
    }
    return SimpleNamespace(**{**values, **overrides})


def test_trap_08_v1_with_speculation_is_refused_before_it_fails() -> None:
    speculation = SimpleNamespace(num_speculative_tokens=2)
    with pytest.raises(UsageError, match="V1 model runner takes no processors beside speculation"):
        prepare(config_for_prepare(speculative_config=speculation), MetisConfig())
    arena = prepare(config_for_prepare(speculative_config=speculation, use_v2_model_runner=True), MetisConfig())
    arena.close()


@pytest.mark.parametrize(("in_pieces", "refused"), [(True, True), (False, False)])
def test_trap_09_a_seed_is_refused_where_it_would_end_the_engine(
    arena: TraceArena, in_pieces: bool, refused: bool
) -> None:
    """A stand-in for the engine is enough: the request must not get as far as the real one."""
    reached: list[SamplingParams] = []
    scheduler = SimpleNamespace(max_num_seqs=NUM_ROWS, enable_chunked_prefill=in_pieces)
    built = SimpleNamespace(
        vllm_config=SimpleNamespace(scheduler_config=scheduler),
        generate=lambda prompt, params, request_id: reached.append(params),
    )
    engine = WatchedEngine(built, arena, MetisConfig(watch_by_default=False))
    seeded = SamplingParams(seed=7)
    if refused:
        with pytest.raises(RejectedRequestError, match="cannot combine it with prompts read in pieces"):
            engine.generate("a prompt", seeded, "seeded")
    else:
        engine.generate("a prompt", seeded, "seeded")
    engine.generate("a prompt", SamplingParams(), "not seeded")
    assert len(reached) == (1 if refused else 2)


def test_prepare_bounds_the_memory_and_loads_the_processor_once() -> None:
    config = config_for_prepare()
    arena = prepare(config, MetisConfig(max_trace_tokens=100))
    assert (arena.num_slots, arena.max_tokens) == (2 * NUM_ROWS + 64, 32)
    assert config.model_config.logits_processors == [PROCESSOR]
    assert config.additional_config == {"theirs": 1, "sparkray_metis": {"arena": str(arena.path)}}
    arena.close()


def test_a_pooling_model_is_refused() -> None:
    model = SimpleNamespace(runner_type="pooling", model="embedder", max_model_len=32, logits_processors=None)
    with pytest.raises(UsageError, match="embedder is a pooling model"):
        prepare(config_for_prepare(model_config=model), MetisConfig())


@slow_ok
@given(seeds)
def test_trap_10_placeholder_tokens_do_not_shift_the_count(seed: int) -> None:
    """Async scheduling appends -1 for a token that is on its way; the count of tokens is right all the same."""
    # The careful boost reads the last token, which vLLM puts in before it calls a processor; here nobody does.
    switches = [other for other in SWITCHES if other != CAREFUL_SWITCHES]
    with new_arena() as arena:
        play(V1Life(arena, random.Random(seed), switches=switches), placeholders=True)


@slow_ok
@given(seeds)
def test_trap_11_ranks_do_the_same_to_logits_and_one_writes(seed: int) -> None:
    """Two processors with ranks 0 and 1 get the same steps, for no two ranks run on one CPU.

    `V1Life` compares what they do bit for bit, and the trace is as if there were one.
    """
    with new_arena() as arena:
        ranks = [processor_of(arena, rank=rank, num_ranks=2) for rank in range(2)]
        assert [processor._publisher is None for processor in ranks] == [False, True]
        play(V1Life(arena, random.Random(seed), ranks))


def test_trap_11_a_worker_without_the_memory_says_where_it_must_run(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="must run on the host"):
        MetisLogitsProcessor(vllm_config(tmp_path / "elsewhere.arena"), CPU, is_pin_memory=False)


@pytest.mark.parametrize("xargs", [None, {}, {"metis": False}, {"metis": "off"}, {"other": 1}])
def test_trap_12_no_switch_is_no_watching(arena: TraceArena, xargs: dict[str, object] | None) -> None:
    processor = processor_of(arena)
    params = SamplingParams(extra_args=xargs)
    validate_logits_processors_parameters([PROCESSOR], params)
    processor.update_state(added(0, params, []))
    assert processor._plan is None


@pytest.mark.parametrize("xargs", [{"metis": {}}, {"metis": {"slot": 1}}, {"metis_hegde": 3}, {"metis_hedge": "4"}])
def test_trap_12_what_is_no_switch_is_refused_and_not_passed_over(xargs: dict[str, object]) -> None:
    with pytest.raises(VLLMValidationError, match=r"expected|not a key"):
        validate_logits_processors_parameters([PROCESSOR], SamplingParams(extra_args=xargs))
