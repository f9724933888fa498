"""The logits processor: METIS inside vLLM, one class for both of its model runners.

vLLM's V1 runner tells of every change of the batch and then hands over one row a request; its V2 runner gives a
request a place for life and hands over positions, and a row for every speculated token. `RequestRows` holds what is
common; this file translates. The entropies are those of the logits as they reach a processor: after token bans and
grammar masks, before temperature (and, under V1 only, before penalties).

Under tensor parallelism every rank samples. What a processor does to logits is therefore a function of the logits
and the request's switches alone, the same on every rank, and rank 0 alone writes to the shared memory.

Shapes: B rows of logits, R requests in a step, V vocabulary, F numbers of a recorded token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from sparkray.errors import SparkrayError
from sparkray.metis.arena import IntArray, TraceArena
from sparkray.metis.boost import BoostTable, apply_boost
from sparkray.metis.entropy import EntropyStats, entropy_stats, warm_up
from sparkray.metis.options import parse_xargs
from sparkray.metis.profile import ProfileStore
from sparkray.metis.publish import create_publisher, pack_step
from sparkray.metis.rows import Occupant, RequestRows
from sparkray.metis.rules import CAREFUL

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:  # vllm before 0.32

    class V2LogitsProcessor:  # type: ignore[no-redef]
        """Stands where this vLLM has no processors for its V2 runner."""


CONFIG_KEY = "sparkray_metis"
SEVERAL_ANSWERS = (
    "n must be 1 for a request that METIS watches: the answers of one request would share one trace. "
    "Send n requests instead."
)
PROCESSOR = "sparkray.metis.vllm_processor:MetisLogitsProcessor"


class MetisLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Watches the requests that ask for it and boosts those that ask for that.

    Loaded by vLLM as `logits_processors=["sparkray.metis.vllm_processor:MetisLogitsProcessor"]`. Where
    `additional_config["sparkray_metis"]["arena"]` names a trace arena, every watched token is recorded there.

    Args:
        vllm_config: the engine's settings.
        device_or_states: the device (V1), or the runner's request states (V2).
        is_pin_memory: V1 only.
    """

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool | None = None) -> None:
        self._states = device_or_states if hasattr(device_or_states, "prefill_len") else None
        device = torch.device(device_or_states if self._states is None else self._states.device)
        num_rows = vllm_config.scheduler_config.max_num_seqs if self._states is None else self._states.max_num_reqs
        speculative = vllm_config.speculative_config
        self._max_drafts = speculative.num_speculative_tokens if speculative else 0
        self._model_config = vllm_config.model_config
        self._device = device
        self._boost_table: BoostTable | None = None

        arena = _attach_arena(vllm_config)
        stash_size = 4 * num_rows + (arena.num_slots if arena else 0)
        self._rows = RequestRows(num_rows, device, max_drafts=self._max_drafts, stash_size=stash_size)
        self._publisher = create_publisher(arena, device) if arena else None

        self._outputs: list[list[int]] = [[] for _ in range(num_rows)]
        self._plan: _Plan | None = None
        if vllm_config.parallel_config.tensor_parallel_size == 1:
            # Ranks that time kernels for themselves may choose differently, and so differ in a last bit.
            warm_up(device, torch.float32, vllm_config.model_config.get_vocab_size(), min(num_rows, 64))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse switches that cannot be obeyed; vLLM answers with HTTP 400.

        Raises:
            ValueError: saying what was given and what is accepted.
        """
        try:
            options = parse_xargs(sampling_params.extra_args, profiles=ProfileStore.from_environment())
        except SparkrayError as error:
            raise ValueError(str(error)) from error
        if options is not None and sampling_params.n > 1:
            raise ValueError(SEVERAL_ANSWERS)

    def is_argmax_invariant(self) -> bool:
        # True would be skipped for greedy requests and, for the others, run after temperature.
        return False

    # V1

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removals, then arrivals, then moves."""
        if batch_update is None:
            return
        rows = self._rows
        for row in batch_update.removed:
            rows.vacate(row)
        for row, params, _, output_token_ids in batch_update.added:
            rows.admit(row, _occupant(params))
            self._outputs[row] = output_token_ids
        for first, second, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                rows.swap(first, second)
                self._outputs[first], self._outputs[second] = self._outputs[second], self._outputs[first]
            else:
                rows.move(first, second)
                self._outputs[second] = self._outputs[first]
        self._plan = _Plan.of(rows, batch_update.batch_size, self._device)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Observe the rows of watched requests, and boost in place those that are due.

        Args:
            logits: [B, V] float32.
            ctx: how rows belong to requests; given by the V2 runner only.
        """
        if self._states is not None:
            return self._apply_v2(logits, ctx, self._states)
        if self._plan is None:
            return logits
        return self._apply_v1(logits, self._plan)

    def _apply_v1(self, logits: Tensor, plan: _Plan) -> Tensor:
        outputs = [self._outputs[row] for row in plan.rows_np]
        num_kept = np.fromiter(map(len, outputs), np.int64, len(outputs))
        positions_B = torch.from_numpy(num_kept).to(self._device, non_blocking=True)
        restarted_B = self._rows.settle(plan.rows_B, positions_B, plan.keep_B)
        last_tokens_B = None
        if plan.careful:
            last_tokens = np.fromiter((ids[-1] if ids else -1 for ids in outputs), np.int64, len(outputs))
            last_tokens_B = torch.from_numpy(last_tokens).to(self._device, non_blocking=True)
        stats = entropy_stats(logits.index_select(0, plan.rows_B) if plan.gather else logits)
        tokens_BF, mode_B, bonus_B = self._observe(plan.rows_B, stats, logits.shape[-1], plan.keep_B, last_tokens_B)
        if plan.boosting:
            self._boost(logits, plan.rows_B, mode_B, bonus_B)
        if self._publisher:
            step_BP = pack_step(positions_B, positions_B, restarted_B, plan.keep_B, tokens_BF)
            self._publisher.publish(plan.slots, plan.generations, step_BP)
        return logits

    # V2

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request enters the batch at a place that may have been another's."""
        self._rows.admit(req_idx, _occupant(sampling_params))
        return bool(self._rows.watched[req_idx])

    def _apply_v2(self, logits: Tensor, ctx: Any, states: Any) -> Tensor:
        places = ctx.idx_mapping_np
        rows = self._rows
        if not rows.watched[places].any():
            return logits
        request_rows_R, row_of_B = ctx.idx_mapping.long(), ctx.expanded_idx_mapping.long()
        num_seen_B = ctx.pos.long() + 1
        positions_B = num_seen_B - states.prompt_len.gpu.index_select(0, row_of_B)
        # A piece of a prompt, or of what is read again after a preemption, yields no token.
        keep_B = num_seen_B >= states.prefill_len.gpu.index_select(0, row_of_B)
        keep_B &= torch.from_numpy(rows.watched).to(self._device, non_blocking=True).index_select(0, row_of_B)
        stats = entropy_stats(logits)
        boosting, careful = bool(rows.boosts[places].any()), bool((rows.boosts[places] == CAREFUL).any())

        # With drafts a request has several rows, of which each needs the state after the one before: the d-th rows
        # of all requests go together.
        drafted = len(logits) != len(places)
        index_DR = self._index_by_draft(request_rows_R, row_of_B, ctx.expanded_local_pos.long(), drafted)
        first_R, steps = index_DR[0], []
        settled_R = keep_B[first_R]
        restarted_R = rows.settle(request_rows_R, positions_B[first_R], settled_R)
        for draft, index_R in enumerate(index_DR):
            exists_R = index_R >= 0
            index_R = index_R.clamp_min(0)
            kept_R = keep_B[index_R] & exists_R
            stats_R = EntropyStats(stats.entropy_B[index_R], stats.max_prob_B[index_R])
            last_tokens_R = None
            if careful:
                # Under V1 only the answer's own tokens are seen, so what ends the prompt is left out here too.
                last_tokens_R = torch.where(positions_B > 0, ctx.input_ids.long(), -1)[index_R]
            tokens_RF, mode_R, bonus_R = self._observe(request_rows_R, stats_R, logits.shape[-1], kept_R, last_tokens_R)
            if self._max_drafts:
                rows.remember(request_rows_R, draft + 1, settled_R)
            if boosting:
                self._boost(logits, index_R, mode_R, bonus_R)
            if self._publisher:
                positions_R = positions_B[index_R]
                steps.append(
                    pack_step(positions_R, positions_B[first_R], restarted_R & (draft == 0), kept_R, tokens_RF)
                )
        if self._publisher:
            slots, generations = rows.slots[places], rows.generations[places]
            self._publisher.publish(np.tile(slots, len(steps)), np.tile(generations, len(steps)), torch.cat(steps))
        return logits

    def _index_by_draft(self, request_rows_R: Tensor, row_of_B: Tensor, local_B: Tensor, drafted: bool) -> Tensor:
        """[D, R]: which row of logits is the d-th of each request; -1 where a request has fewer."""
        numbers_B = torch.arange(len(row_of_B), device=self._device)
        if not drafted:
            return numbers_B.unsqueeze(0)
        table = torch.full((self._max_drafts + 1, len(self._rows.watched)), -1, device=self._device)
        table[local_B, row_of_B] = numbers_B
        return table[:, request_rows_R]

    # both

    def _observe(
        self,
        rows_B: Tensor,
        stats: EntropyStats,
        vocab_size: int,
        keep_B: Tensor,
        last_tokens_B: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens_BF, mode_B, bonus_B); the bonus is 0 where not kept, the last tokens are for the careful boost."""
        bank = self._rows.bank
        sentence_end_B = None
        if last_tokens_B is not None:
            sentence_end_B = self._table().ends_sentence(last_tokens_B)
        tokens_BF = bank.observe(rows_B, stats, vocab_size, keep_B, sentence_end_B)
        mode_B, bonus_B = bank.boost_bonus(rows_B, tokens_BF)
        # A row that is not watched still holds what its last request left.
        return tokens_BF, mode_B, torch.where(keep_B, bonus_B, 0.0)

    def _boost(self, logits: Tensor, rows_B: Tensor, mode_B: Tensor, bonus_B: Tensor) -> None:
        apply_boost(logits, rows_B, mode_B, bonus_B, self._table())

    def _table(self) -> BoostTable:
        if self._boost_table is None:
            self._boost_table = BoostTable(cached_tokenizer_from_config(self._model_config), self._device)
        return self._boost_table


@dataclass(frozen=True)
class _Plan:
    """Who is looked at in every step until the batch changes (V1).

    Attributes:
        rows_np, rows_B: rows of the batch; all where most are watched, else only the watched ones.
        gather: whether rows are left out.
        keep_B: which of the rows are watched.
        boosting: whether any may be boosted.
        careful: whether any of those is the careful kind, which asks for the token before.
        slots, generations: where their traces go.
    """

    rows_np: IntArray
    rows_B: Tensor
    gather: bool
    keep_B: Tensor
    boosting: bool
    careful: bool
    slots: IntArray
    generations: IntArray

    @classmethod
    def of(cls, rows: RequestRows, batch_size: int, device: torch.device) -> _Plan | None:
        """The plan for a batch; None where nobody is watched."""
        watched = rows.watched[:batch_size]
        num_watched = int(watched.sum())
        if not num_watched:
            return None
        # Computing a few rows for nothing is cheaper than copying the others together.
        gather = 2 * num_watched < batch_size
        chosen = np.flatnonzero(watched) if gather else np.arange(batch_size)
        return cls(
            rows_np=chosen,
            rows_B=torch.from_numpy(chosen).to(device),
            gather=gather,
            keep_B=torch.from_numpy(watched[chosen]).to(device),
            boosting=bool(rows.boosts[:batch_size].any()),
            careful=bool((rows.boosts[:batch_size] == CAREFUL).any()),
            slots=rows.slots[chosen],
            generations=rows.generations[chosen],
        )


def _occupant(params: SamplingParams) -> Occupant | None:
    options = parse_xargs(params.extra_args)
    if options is None:
        return None
    if options.slot is not None:
        return Occupant(("slot", options.slot), options)
    # Without a slot: both runners hand over the same object when a request comes back.
    return Occupant(("object", id(params)), options, anchor=params)


def _attach_arena(vllm_config: Any) -> TraceArena | None:
    parallel = vllm_config.parallel_config
    ours = vllm_config.additional_config.get(CONFIG_KEY)
    if ours is None or parallel.rank % parallel.tensor_parallel_size:
        return None
    return TraceArena.attach(Path(ours["arena"]))
