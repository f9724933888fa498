"""Random lives of requests, played against the processor through vLLM's own batch classes, without an engine.

`V1Life` drives the V1 runner's `InputBatch` as `GPUModelRunner._update_states` does: removals, unscheduled and
preempted requests, arrivals into freed rows, condensing, reordering; prompts in pieces yield distributions that count
for nothing. `V2Life` drives the V2 interface: places that are reused without notice, positions, drafts of which some
are rejected. Both note which distributions were kept, which is all that the oracle needs.

Shapes: V vocabulary, F numbers of a recorded token, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from sparkray.metis.arena import Slot, TraceArena
from sparkray.metis.boost import BoostTable
from sparkray.metis.detectors import DetectorBank
from sparkray.metis.entropy import entropy_stats
from sparkray.metis.options import parse_xargs
from sparkray.metis.vllm_processor import CONFIG_KEY, MetisLogitsProcessor

VOCAB = 48
NUM_ROWS = 5
MAX_DRAFTS = 3
MAX_TOKENS = 64

Switches = dict[str, Any] | None
CAREFUL_SWITCHES: Switches = {"metis_hedge": 0.3, "metis_drift": 0.0, "metis_boost": "careful"}
# Alarms come often, so that resets and boosts are part of what is compared.
SWITCHES: tuple[Switches, ...] = (
    {"metis": True},
    {"metis_hedge": 0.4, "metis_refuse": 1.5, "metis_drift": 0.1},
    {"metis_hedge": 0.4, "metis_boost": "published"},
    CAREFUL_SWITCHES,
    {"metis": False},
    None,
)


class Letters:
    """A tokenizer of VOCAB single characters, every seventh of which ends a sentence."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]

    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return ["." if ids[0] % 7 == 0 else "a" for ids in sequences]

    def __len__(self) -> int:
        return VOCAB - 5  # a model's vocabulary may be padded beyond its tokenizer's


def vllm_config(arena_path: Path | None, *, max_drafts: int = 0, rank: int = 0, num_ranks: int = 1) -> SimpleNamespace:
    """As much of a VllmConfig as the processor reads."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=NUM_ROWS),
        speculative_config=SimpleNamespace(num_speculative_tokens=max_drafts) if max_drafts else None,
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB),
        parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=num_ranks),
        additional_config={} if arena_path is None else {CONFIG_KEY: {"arena": str(arena_path)}},
    )


@dataclass
class Life:
    """A request from its arrival to its end.

    Attributes:
        kept: the distributions whose tokens were kept, [V] each.
        seen: what the processor made of each of them.
        output: its tokens.
    """

    name: str
    params: SamplingParams
    slot: Slot | None
    num_prompt_tokens: int
    kept: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    place: int | None = None
    prefill_len: int = 0
    num_read: int = 0

    def check(self, arena: TraceArena) -> None:
        """Compare what was recorded, and done to the logits, with one quiet pass over the kept distributions."""
        options = parse_xargs(self.params.extra_args)
        if options is None:
            for raw, seen in zip(self.kept, self.seen, strict=True):
                assert torch.equal(raw, seen)
            return
        assert self.slot is not None
        bank, table = DetectorBank(1, "cpu"), BoostTable(Letters())
        bank.reset(0, options)
        row = torch.tensor([0])
        expected = []
        for position, (raw, seen) in enumerate(zip(self.kept, self.seen, strict=True)):
            last = torch.tensor([self.output[position - 1] if position else -1])
            token = bank.observe(row, entropy_stats(raw.unsqueeze(0)), VOCAB, None, table.ends_sentence(last))
            expected.append(token[0])
            boosted = raw.clone()
            if token[0, -1]:
                ids_K = table.published_K if options.boost == "published" else table.careful_K
                boosted[ids_K] += options.boost_bonus
            torch.testing.assert_close(seen, boosted)
        recorded = arena.read(self.slot, 0, len(self.kept))
        assert recorded.shape[0] == len(self.output) == len(self.kept)
        if expected:
            np.testing.assert_allclose(recorded, torch.stack(expected).numpy(), rtol=1e-5, atol=1e-5)
        assert arena.progress(self.slot).restarts == 0


class World:
    """Requests that come and go; what both kinds of batch have in common."""

    def __init__(self, arena: TraceArena, chance: random.Random, switches: Sequence[Switches] = SWITCHES) -> None:
        self.arena = arena
        self.chance = chance
        self.switches = switches
        self.running: list[Life] = []
        self.waiting: list[Life] = []
        self.ended: list[Life] = []
        self._num_born = 0
        self._num_logits = 0

    def birth(self) -> Life:
        self._num_born += 1
        xargs = self.chance.choice(self.switches)
        slot = None
        if xargs is not None and xargs.get("metis", True):
            slot = self.arena.claim()
            xargs = {**xargs, "metis_slot": slot.index, "metis_generation": slot.generation}
        params = SamplingParams(temperature=self.chance.choice([0.0, 1.0]), extra_args=xargs)
        life = Life(f"request {self._num_born}", params, slot, num_prompt_tokens=self.chance.randint(1, 9))
        self.waiting.append(life)
        return life

    def end(self, life: Life) -> None:
        self.ended.append(life)
        life.check(self.arena)
        if life.slot is not None:
            self.arena.release(life.slot)

    def logits(self) -> Tensor:
        """A new distribution: flat, peaked, or with most tokens forbidden."""
        self._num_logits += 1
        generator = torch.Generator().manual_seed(self._num_logits)
        logits_V = torch.randn(VOCAB, generator=generator) * self.chance.choice([0.1, 1.0, 6.0])
        if self.chance.random() < 0.2:
            logits_V[torch.rand(VOCAB, generator=generator) < 0.8] = -torch.inf
            logits_V[0] = 1.0
        return logits_V

    def token(self) -> int:
        return self.chance.randrange(VOCAB)


class V1Life(World):
    """The V1 runner's batch."""

    def __init__(
        self,
        arena: TraceArena,
        chance: random.Random,
        processors: Sequence[Any] = (),
        switches: Sequence[Switches] = SWITCHES,
    ) -> None:
        super().__init__(arena, chance, switches)
        self.processors = list(processors) or [
            MetisLogitsProcessor(vllm_config(arena.path), torch.device("cpu"), is_pin_memory=False)
        ]
        self.states: dict[str, CachedRequestState] = {}
        self.batch = InputBatch(
            max_num_reqs=NUM_ROWS,
            max_model_len=MAX_TOKENS * 2,
            max_num_batched_tokens=MAX_TOKENS,
            device=torch.device("cpu"),
            vocab_size=VOCAB,
            block_sizes=[16],
            max_num_blocks_per_req=[8],
            logitsprocs=LogitsProcessors(self.processors),
            logitsprocs_need_output_token_ids=True,
        )

    def step(self, *, placeholders: bool = False) -> None:
        """One step of the engine; with `placeholders` tokens are appended as -1, as under async scheduling."""
        chance = self.chance
        gone = [life for life in self.running if chance.random() < 0.08 or len(life.output) >= MAX_TOKENS]
        for life in gone:
            self.running.remove(life)
            self.batch.remove_request(life.name)
            del self.states[life.name]
        # Preempted or just not scheduled: out of the batch, to come back later.
        pausing = [life for life in self.running if chance.random() < 0.15]
        for life in pausing:
            self.running.remove(life)
            self.waiting.insert(0, life)
            self.batch.remove_request(life.name)
        arrivals = []
        while self.waiting and len(self.running) + len(arrivals) < NUM_ROWS and chance.random() < 0.7:
            # One that pauses in this step may return in it: vLLM does so when the prefix cache is reset.
            arrivals.append(self.waiting.pop(chance.choice([0, -1])))
        for life in arrivals:
            self.batch.add_request(self._state_of(life))
            self.running.append(life)
        self.batch.condense()
        if self.batch.num_reqs > 1 and chance.random() < 0.3:
            self.batch.swap_states(*chance.sample(range(self.batch.num_reqs), 2))
        self.batch.refresh_metadata()
        for life in gone:
            self.end(life)
        if not self.batch.num_reqs:
            return
        raw_BV = torch.stack([self.logits() for _ in range(self.batch.num_reqs)])
        outcomes = [processor.apply(raw_BV.clone()) for processor in self.processors]
        for other in outcomes[1:]:
            assert torch.equal(outcomes[0], other)
        lives = {life.name: life for life in self.running}
        for row, name in enumerate(self.batch.req_ids):
            life = lives[name]
            is_piece = chance.random() < (0.05 if life.output else 0.4)
            if is_piece:
                continue
            life.kept.append(raw_BV[row])
            life.seen.append(outcomes[0][row])
            token = self.token()
            life.output.append(token)
            self.states[name].output_token_ids.append(-1 if placeholders else token)
            self.batch.num_tokens_no_spec[row] += 1

    def _state_of(self, life: Life) -> CachedRequestState:
        if life.name not in self.states:
            self.states[life.name] = CachedRequestState(
                req_id=life.name,
                prompt_token_ids=list(range(life.num_prompt_tokens)),
                mm_features=[],
                sampling_params=life.params,
                generator=None,
                block_ids=([0],),
                num_computed_tokens=0,
                output_token_ids=[],
            )
        return self.states[life.name]


class V2Life(World):
    """The V2 runner's requests: places for life, positions, drafts."""

    def __init__(self, arena: TraceArena, chance: random.Random, *, max_drafts: int = MAX_DRAFTS) -> None:
        super().__init__(arena, chance)
        self.max_drafts = max_drafts
        self.free = list(range(NUM_ROWS))
        self.prompt_len = torch.zeros(NUM_ROWS, dtype=torch.int32)
        self.prefill_len = torch.zeros(NUM_ROWS, dtype=torch.int32)
        states = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=NUM_ROWS,
            vocab_size=VOCAB,
            all_token_ids=None,
            prompt_len=SimpleNamespace(gpu=self.prompt_len),
            prefill_len=SimpleNamespace(gpu=self.prefill_len),
            total_len=None,
        )
        self.processor = MetisLogitsProcessor(vllm_config(arena.path, max_drafts=max_drafts), states)

    def step(self) -> None:
        chance = self.chance
        gone = [life for life in self.running if chance.random() < 0.08 or len(life.output) >= MAX_TOKENS - 8]
        pausing = [life for life in self.running if life not in gone and chance.random() < 0.15]
        for life in (*gone, *pausing):
            self.running.remove(life)
            assert life.place is not None
            self.free.append(life.place)
            life.place = None
        self.waiting[:0] = pausing
        while self.waiting and self.free and chance.random() < 0.7:
            self._admit(self.waiting.pop(chance.choice([0, -1])))
        for life in gone:
            self.end(life)
        scheduled = [life for life in self.running if chance.random() < 0.9]
        chance.shuffle(scheduled)
        if scheduled:
            self._run(scheduled)

    def _admit(self, life: Life) -> None:
        place = life.place = self.free.pop()
        life.prefill_len = life.num_prompt_tokens + len(life.output)
        life.num_read = 0
        self.prompt_len[place], self.prefill_len[place] = life.num_prompt_tokens, life.prefill_len
        self.processor.add_request(place, life.params)
        self.running.append(life)

    def _run(self, scheduled: list[Life]) -> None:
        rows: list[tuple[Life, int, int, Tensor]] = []  # life, local position, position, logits
        drafts: dict[str, list[int]] = {}
        for life in scheduled:
            total = life.num_prompt_tokens + len(life.output)
            if life.num_read < life.prefill_len - 1 and self.chance.random() < 0.5:
                life.num_read += self.chance.randint(1, life.prefill_len - 1 - life.num_read)
                rows.append((life, 0, life.num_read - 1, self.logits()))
                continue
            life.num_read = total
            num_drafts = self.chance.randint(0, self.max_drafts)
            drafts[life.name] = [self.token() for _ in range(num_drafts)]
            rows += [(life, draft, total - 1 + draft, self.logits()) for draft in range(num_drafts + 1)]
        raw_BV = torch.stack([logits for *_, logits in rows])
        places = torch.tensor([life.place for life in scheduled], dtype=torch.int32)
        context = LogitsContext(
            expanded_idx_mapping=torch.tensor([life.place for life, *_ in rows], dtype=torch.int32),
            idx_mapping=places,
            idx_mapping_np=places.numpy(),
            expanded_local_pos=torch.tensor([draft for _, draft, _, _ in rows], dtype=torch.int32),
            input_ids=torch.tensor([self._input(life, draft, drafts) for life, draft, _, _ in rows], dtype=torch.int32),
            pos=torch.tensor([position for _, _, position, _ in rows], dtype=torch.int64),
            seq_lens_upper_bound_np=np.zeros(len(scheduled)),
        )
        seen_BV = self.processor.apply(raw_BV.clone(), context)
        accepted = {name: self.chance.randint(0, len(tokens)) for name, tokens in drafts.items()}
        for row, (life, draft, _, raw) in enumerate(rows):
            if life.name not in drafts or draft > accepted[life.name]:
                continue
            life.kept.append(raw)
            life.seen.append(seen_BV[row])
            is_draft = draft < accepted[life.name]
            life.output.append(drafts[life.name][draft] if is_draft else self.token())

    def _input(self, life: Life, draft: int, drafts: dict[str, list[int]]) -> int:
        if draft:
            return drafts[life.name][draft - 1]
        return life.output[-1] if life.output else 7  # a prompt that ends a sentence
