"""The loop: what a step sees and costs, that a kill or another split of work changes nothing, and that it teaches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparkray.config.base import validate_settings
from sparkray.config.distill import LossConfig, OnPolicyConfig, PackConfig, StudentConfig, TrainConfig
from sparkray.distill.data.pack import Pack, pack_documents
from sparkray.distill.data.sources import Document
from sparkray.distill.scores import TokenScores
from sparkray.distill.students.causal import CausalStudent, create_causal_student
from sparkray.distill.targets import draw_generator, scores_from_logits
from sparkray.distill.training.batch import loss_sums, micro_batch
from sparkray.distill.training.checkpoint import latest_checkpoint
from sparkray.distill.training.evaluate import calibration_error, evaluate
from sparkray.distill.training.objective import CausalObjective
from sparkray.distill.training.on_policy import OnPolicyObjective
from sparkray.distill.training.order import batch_of_step, epoch_order, learning_rate, share_of_rank
from sparkray.distill.training.supervision import DataOnly, FromStore
from sparkray.distill.training.trainer import StepReport, Trainer
from sparkray.errors import UsageError

VOCAB_SIZE, END = 40, 39
CPU = torch.device("cpu")
SHAPE = StudentConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of this size cost more in handing out than in computing, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_pack() -> Pack:
    generator = np.random.default_rng(0)
    texts = ["".join(chr(97 + int(c)) for c in generator.integers(0, 26, size)) for size in (40, 25, 60, 33, 51, 20)]
    documents = [Document(str(number), "test", text) for number, text in enumerate(texts)]
    config = PackConfig(sequence_tokens=16, chunk_tokens=2, validation_share=0.2)
    return pack_documents(
        documents,
        lambda text: [ord(character) - 97 for character in text],
        config,
        end_id=END,
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256="t",
    )


PACK = make_pack()


def student(seed: int = 0, **values: Any) -> CausalStudent:
    return create_causal_student(SHAPE, vocab_size=VOCAB_SIZE, max_tokens=32, seed=seed, **values)


class Rows:
    """A fixed bigram teacher: sharp, so that there is something to learn that the data does not say."""

    def __init__(self) -> None:
        self.logits_VV = 3 * torch.randn((VOCAB_SIZE, VOCAB_SIZE), generator=torch.Generator().manual_seed(5))

    @cache  # noqa: B019
    def __call__(self, sequence: int) -> TokenScores:
        tokens = PACK.train.tokens(sequence)
        return scores_from_logits(
            self.logits_VV[torch.tensor(tokens[:-1])],
            torch.tensor(tokens[1:]),
            top_logprobs=6,
            tail_draws=3,
            generator=draw_generator(0, tokens),
        )


def trainer(
    model: CausalStudent | None = None, *, loss: dict[str, Any] | None = None, workers: Any = None, **train: Any
) -> Trainer:
    quick = {"num_steps": 6, "batch_sequences": 4, "micro_batch_sequences": 4, "warmup_steps": 2, "checkpoint_steps": 2}
    settings = validate_settings(TrainConfig, quick | train)
    return Trainer(
        model or student(),
        PACK,
        FromStore(Rows()),
        CausalObjective(validate_settings(LossConfig, loss or {})),
        settings,
        {"pack": PACK.header.data_sha256},
        workers,
    )


def test_every_epoch_is_a_permutation_and_a_step_the_same_for_any_number_of_workers() -> None:
    config = TrainConfig(batch_sequences=4, seed=3)
    seen = [number for step in range(7) for number in batch_of_step(step, 7, config)]
    assert [Counter(seen[start : start + 7]) for start in range(0, 28, 7)] == [Counter(range(7))] * 4
    assert epoch_order(0, 7, 3).tolist() != epoch_order(1, 7, 3).tolist()
    batch = batch_of_step(5, 7, config)
    for size in (1, 2, 3):
        assert sorted(n for rank in range(size) for n in share_of_rank(batch, rank, size)) == sorted(batch)


def test_rates_by_hand() -> None:
    config = TrainConfig(num_steps=12, warmup_steps=2, learning_rate=1.0, min_rate_share=0.2)
    assert learning_rate(0, config) == 0.5
    assert learning_rate(1, config) == 1.0
    assert learning_rate(2, config) == 1.0
    assert learning_rate(7, config) == pytest.approx(0.2 + 0.8 / 2)
    assert learning_rate(12, config) == pytest.approx(0.2)


def test_sums_are_over_the_rows_that_count() -> None:
    model, rows = student(), Rows()
    config = LossConfig(ce_weight=0.25, kd_weight=2.0, chunk_rows=5)
    numbers = [len(PACK.train) - 1, 1]
    batch = micro_batch(PACK.train, numbers, [rows(number) for number in numbers], CPU)
    found = loss_sums(model, batch, config)
    expected_ce = expected_kd = 0.0
    for number in numbers:
        tokens, mask = PACK.train.tokens(number), PACK.train.row_mask(number)
        student_LV = model.logits(torch.tensor([tokens]))[0].log_softmax(-1).numpy()
        scores = rows(number)
        for row in range(len(tokens) - 1):
            if not mask[row]:
                continue
            expected_ce -= student_LV[row, tokens[row + 1]]
            p = np.exp(scores.head_logprobs_LK[row])
            cross = (p * student_LV[row, scores.head_ids_LK[row]]).sum()
            cross += (1 - p.sum()) * student_LV[row, scores.tail_ids_LM[row]].mean()
            expected_kd += -cross - scores.entropy_L[row]
    assert batch.num_rows == sum(int(PACK.train.row_mask(number).sum()) for number in numbers)
    assert found.cross_entropy.item() == pytest.approx(expected_ce, rel=1e-4)
    assert found.distillation.item() == pytest.approx(expected_kd, rel=1e-4)
    assert found.total.item() == pytest.approx(0.25 * expected_ce + 2 * expected_kd, rel=1e-4)


def test_accumulation_gives_the_same_step() -> None:
    whole, parts = trainer(), trainer(micro_batch_sequences=1)
    left, right = whole.run_step(), parts.run_step()
    assert left.loss == pytest.approx(right.loss, rel=1e-6)
    assert left.num_rows == right.num_rows
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class OneOf:
    """One of several workers; keeps its gradients and lets another take them."""

    def __init__(self, rank: int, world_size: int, others: list[OneOf]) -> None:
        self.rank, self.world_size, self.others = rank, world_size, others
        self.gradients: list[Tensor] = []
        self.sums = torch.zeros(3)

    def sum_gradients(self, model: nn.Module) -> None:
        self.gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        for number, parameter in enumerate(model.parameters()):
            for other in self.others:
                assert parameter.grad is not None
                parameter.grad += other.gradients[number]

    def sum(self, values: Tensor) -> Tensor:
        self.sums = values
        return values + sum(other.sums for other in self.others)


def test_two_workers_make_the_step_that_one_makes() -> None:
    first = OneOf(0, 2, [])
    second = OneOf(1, 2, [first])
    trainer(workers=first).run_step()
    pair, alone = trainer(workers=second), trainer()
    together, single = pair.run_step(), alone.run_step()
    assert together.loss == pytest.approx(single.loss, rel=1e-5)
    for a, b in zip(pair.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def losses(reports: Sequence[StepReport]) -> list[float]:
    return [report.loss for report in reports]


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    undisturbed = trainer().run(tmp_path / "a")

    class Killed(BaseException):
        pass

    def kill(report: StepReport) -> None:
        if report.step == 5:
            raise Killed

    with pytest.raises(Killed):
        trainer().run(tmp_path / "b", on_step=kill)
    found = latest_checkpoint(tmp_path / "b" / "checkpoints")
    assert found is not None
    assert found.name == "step-00000004"
    # What a kill in the middle of a write leaves is not taken for a checkpoint.
    (tmp_path / "b" / "checkpoints" / "step-00000006.building").mkdir()
    resumed = trainer(student(seed=9)).run(tmp_path / "b")
    assert losses(resumed) == losses(undisturbed)[4:]
    assert sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    assert trainer().run(tmp_path / "b") == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(num_steps=2).run(tmp_path)
    other = trainer()
    other._run = {"pack": "another"}
    with pytest.raises(UsageError, match="another run: pack differ"):
        other.resume(tmp_path / "checkpoints")


def kl_after(loss: dict[str, Any], read: Callable[[int], TokenScores] | None) -> float:
    model = student()
    settings = TrainConfig(num_steps=60, batch_sequences=8, micro_batch_sequences=8, learning_rate=1e-2, warmup_steps=5)
    supervision = DataOnly() if read is None else FromStore(read)
    objective = CausalObjective(validate_settings(LossConfig, loss))
    made = Trainer(model, PACK, supervision, objective, settings, {})
    for _ in range(60):
        made.run_step()
    bigrams = Rows().logits_VV
    found = evaluate(
        model, PACK.validation, [0, 1], lambda number: bigrams[torch.tensor(PACK.validation.tokens(number)[:-1])], CPU
    )
    assert found.kl_to_teacher is not None
    return found.kl_to_teacher


def test_rows_teach_and_rows_in_the_wrong_places_do_not() -> None:
    rows = Rows()
    data_only = kl_after({"ce_weight": 1.0, "kd_weight": 0.0}, None)
    taught = kl_after({"ce_weight": 0.0, "kd_weight": 1.0}, rows)
    bucket = kl_after({"ce_weight": 0.0, "kd_weight": 1.0, "target": "tail_bucket"}, rows)
    shuffle = np.random.default_rng(0)

    def wrong(sequence: int) -> TokenScores:
        scores = rows(sequence)
        order = shuffle.permutation(scores.num_rows)
        return TokenScores(
            scores.head_ids_LK[order],
            scores.head_logprobs_LK[order],
            scores.token_logprobs_L[order],
            scores.tail_ids_LM[order],
            scores.entropy_L[order],
        )

    assert taught < 0.6 * data_only
    assert bucket < 0.6 * data_only
    assert kl_after({"ce_weight": 0.0, "kd_weight": 1.0}, wrong) > 1.5 * taught


def test_evaluation_is_against_data_and_teacher() -> None:
    model, bigrams = student(), Rows().logits_VV
    found = evaluate(
        model, PACK.validation, [0], lambda number: bigrams[torch.tensor(PACK.validation.tokens(number)[:-1])], CPU
    )
    tokens, mask = PACK.validation.tokens(0), PACK.validation.row_mask(0)
    q = torch.softmax(model.logits(torch.tensor([tokens]))[0, :-1], -1).numpy().astype(np.float64)
    p = torch.softmax(bigrams[torch.tensor(tokens[:-1])], -1).numpy().astype(np.float64)
    rows = [row for row in range(len(tokens) - 1) if mask[row]]
    assert found.num_rows == len(rows)
    assert found.cross_entropy == pytest.approx(-np.mean([math.log(q[row, tokens[row + 1]]) for row in rows]), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.cross_entropy))
    assert found.kl_to_teacher == pytest.approx(np.mean([(p[r] * np.log(p[r] / q[r])).sum() for r in rows]), rel=1e-4)
    assert found.reverse_kl == pytest.approx(np.mean([(q[r] * np.log(q[r] / p[r])).sum() for r in rows]), rel=1e-4)


def test_calibration_by_hand() -> None:
    # Two rows in one bin (confidence 0.9, one right), one in another (confidence 0.5, right).
    found = calibration_error(torch.tensor([0.9, 0.9, 0.5]), torch.tensor([1.0, 0.0, 1.0]))
    assert found == pytest.approx((abs(1.8 - 1.0) + abs(0.5 - 1.0)) / 3, rel=1e-5)


def test_recomputed_activations_and_adapters(tmp_path: Path) -> None:
    plain, recomputing = trainer(), trainer(student(activation_checkpointing=True))
    assert plain.run_step().loss == pytest.approx(recomputing.run_step().loss, rel=1e-6)
    for a, b in zip(plain.student.parameters(), recomputing.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    (tmp_path / "base").mkdir()
    student().save(tmp_path / "base")
    config = validate_settings(StudentConfig, {"init_from": str(tmp_path / "base"), "lora": {"rank": 2}})
    adapted = create_causal_student(config, vocab_size=VOCAB_SIZE, max_tokens=32, seed=0)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    before = adapted.head.clone()
    first = trainer(adapted)
    assert first.run_step().loss == pytest.approx(plain_loss(), rel=1e-5)
    assert torch.equal(adapted.head, before)
    with pytest.raises(UsageError, match="adapters beside random weights"):
        validate_settings(StudentConfig, {"lora": {}})


def plain_loss() -> float:
    return trainer().run_step().loss


def bigram_scores(sequences: Sequence[list[int]]) -> list[TokenScores]:
    bigrams = Rows().logits_VV
    return [
        scores_from_logits(
            bigrams[torch.tensor(tokens[:-1])], torch.tensor(tokens[1:]), top_logprobs=VOCAB_SIZE - 1, tail_draws=1
        )
        for tokens in sequences
    ]


def on_policy(share: float, asked: list[list[int]], **loss: Any) -> OnPolicyObjective:
    def score(sequences: Sequence[list[int]]) -> list[TokenScores]:
        asked.extend(sequences)
        return bigram_scores(sequences)

    config = OnPolicyConfig(share=share, prompt_tokens=4, new_tokens=6)
    return OnPolicyObjective(validate_settings(LossConfig, {"target": "tail_bucket", **loss}), config, score)


def test_the_student_writes_and_the_teacher_scores_what_was_written() -> None:
    asked: list[list[int]] = []
    objective = on_policy(1.0, asked, ce_weight=1.0, kd_weight=1.0, divergence="reverse_kl")
    model = student()
    torch.manual_seed(0)
    found = objective.losses(model, PACK.train, [0, 2], None, CPU)
    assert [tokens[:4] for tokens in asked] == [PACK.train.tokens(number)[:4] for number in (0, 2)]
    assert [len(tokens) for tokens in asked] == [10, 10]
    expected = 0.0
    for tokens in asked:
        q = torch.softmax(model.logits(torch.tensor([tokens]))[0, 3:-1], -1).double()
        p = torch.softmax(Rows().logits_VV[torch.tensor(tokens[3:-1])], -1).double()
        expected += (q * (q.log() - p.log())).sum().item()
    # Cross entropy on the student's own words would only make it surer of them.
    assert found.total.item() == pytest.approx(expected, rel=1e-3)
    assert objective.num_rows(PACK.train, 0) == 6


def test_the_mix_is_the_same_however_a_batch_is_split() -> None:
    asked: list[list[int]] = []
    objective = on_policy(0.5, asked)
    numbers = list(range(len(PACK.train)))
    own = [number for number in numbers if objective.num_rows(PACK.train, number) == 6]
    assert 0 < len(own) < len(numbers)
    rows = [Rows()(number) for number in numbers]
    objective.losses(student(), PACK.train, numbers, rows, CPU)
    prompts = [tokens[:4] for tokens in asked]
    assert prompts == [PACK.train.tokens(number)[:4] for number in own]
    torch.manual_seed(0)
    none_written = on_policy(0.0, []).losses(student(), PACK.train, numbers, rows, CPU)
    plain = CausalObjective(LossConfig(target="tail_bucket")).losses(student(), PACK.train, numbers, rows, CPU)
    assert none_written.total.item() == plain.total.item()


def test_own_words_teach_too() -> None:
    asked: list[list[int]] = []
    settings = TrainConfig(num_steps=60, batch_sequences=8, micro_batch_sequences=8, learning_rate=1e-2, warmup_steps=5)
    objective = on_policy(1.0, asked, ce_weight=0.0, kd_weight=1.0, divergence="reverse_kl")
    made = Trainer(student(), PACK, DataOnly(), objective, settings, {})
    reports = [made.run_step() for _ in range(60)]
    assert reports[-1].distillation < 0.7 * reports[0].distillation
