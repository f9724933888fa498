"""The latent pair: it cannot see what it predicts, noise stays noise, and its scores are what their formulas say."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparkray.config.distill import AutoencoderConfig, LatentConfig, LossConfig, PackConfig
from sparkray.distill.data.pack import Pack, PackHeader, Sequences, pack_documents
from sparkray.distill.data.sources import Document
from sparkray.distill.scores import TokenScores
from sparkray.distill.students.autoencoder import ChunkAutoencoder, Posterior
from sparkray.distill.students.brier import brier_lm, brier_scores
from sparkray.distill.students.energy import energy_loss
from sparkray.distill.students.latent import LatentStudent, choose_chunk, draw_tokens
from sparkray.distill.students.sampled_softmax import sampled_cross_entropy
from sparkray.distill.targets import scores_from_logits
from sparkray.distill.training.autoencoder import (
    aligned_chunks,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)
from sparkray.distill.training.latent_evaluate import evaluate_latent
from sparkray.distill.training.objective import LatentObjective
from sparkray.errors import InputError, NotFoundError

VOCAB_SIZE, CHUNK = 12, 2
CPU = torch.device("cpu")
SMALL = AutoencoderConfig(
    chunk_tokens=CHUNK, latent_size=8, hidden_size=32, num_steps=400, batch_chunks=64, learning_rate=3e-3
)
# The energy score alone, unless a test says otherwise.
SHAPE = LatentConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    noise_size=8,
    num_targets=8,
    latent_weight=1.0,
    ce_weight=0.0,
    token_choice="likeliest",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sequences(ids_ST: np.ndarray) -> Sequences:
    return Sequences(ids_ST.astype(np.int32), np.zeros(ids_ST.shape, np.int32))


def pack_of(train: np.ndarray, validation: np.ndarray) -> Pack:
    header = PackHeader(train.shape[1], CHUNK, VOCAB_SIZE, 0, "t", "d")
    return Pack(header, sequences(train), sequences(validation))


NOISE = np.random.default_rng(0).integers(0, VOCAB_SIZE, (48, 16))
# Chunks follow each other by a rule: both tokens of the next chunk are one more.
CHAIN = (np.arange(48)[:, None] + np.arange(16)[None] // CHUNK) % VOCAB_SIZE


@pytest.fixture(scope="module")
def autoencoder() -> ChunkAutoencoder:
    return train_autoencoder(pack_of(NOISE, NOISE[:4]), SMALL, CPU)


def student(autoencoder: ChunkAutoencoder) -> LatentStudent:
    torch.manual_seed(0)
    return LatentStudent(SHAPE, autoencoder, max_chunks=8)


def test_the_autoencoder_returns_chunks_that_it_never_saw(autoencoder: ChunkAutoencoder) -> None:
    every = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=CHUNK)))
    assert autoencoder.exact_match(every) >= 0.995
    # Eight numbers are too few for the linear code that training begins from.
    untrained = ChunkAutoencoder(SMALL, VOCAB_SIZE)
    assert untrained.exact_match(every) < 0.6


def test_held_out_text_of_any_length_is_matched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """38,000 chunks of a vocabulary of 49,152 at once asked for 30 gigabytes of logits."""
    model = ChunkAutoencoder(SMALL, VOCAB_SIZE)
    sizes = []

    def all_zero_but_for_the_last_part(latents_NZ: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents_NZ))
        return torch.eye(VOCAB_SIZE)[int(len(latents_NZ) != 256)].expand(len(latents_NZ), CHUNK, VOCAB_SIZE)

    monkeypatch.setattr(model, "decode", all_zero_but_for_the_last_part)
    assert model.exact_match(torch.zeros((2 * 256 + 88, CHUNK), dtype=torch.int64)) == 512 / 600
    assert sizes == [256, 256, 88]


def test_training_begins_from_a_code_that_tells_chunks_apart() -> None:
    torch.manual_seed(0)
    wide = SMALL.model_copy(update={"chunk_tokens": 4, "hidden_size": 128, "latent_size": 128})
    chunks = torch.randint(2000, (100, 4))
    assert ChunkAutoencoder(wide, 2000).exact_match(chunks) >= 0.85


def test_a_large_vocabulary_is_drawn_from_and_the_own_token_is_always_there() -> None:
    """With all logits equal, the cross entropy is the logarithm of how many tokens it is taken over."""
    torch.manual_seed(0)
    model = ChunkAutoencoder(SMALL.model_copy(update={"num_negatives": 50}), 500)
    model.embedding.weight.data.zero_()
    chunks = torch.tensor([[7, 499], [7, 0]])
    num_tokens = [round(model.loss(chunks)[1].exp().item()) for _ in range(40)]
    # Three of their own and 50 drawn; a drawn one that is an own one falls away.
    assert max(num_tokens) == 53
    assert min(num_tokens) >= 50
    model.config = model.config.model_copy(update={"num_negatives": 497})
    assert model.loss(chunks)[1].exp().item() == pytest.approx(500, rel=1e-4)


def test_masking_and_the_free_part_act_in_training_alone() -> None:
    torch.manual_seed(0)
    model = ChunkAutoencoder(SMALL, VOCAB_SIZE)
    chunks = torch.zeros((64, CHUNK), dtype=torch.int64)
    model.train()
    assert len({tuple(mean.tolist()) for mean in model.encode(chunks).mean.detach().round(decimals=4)}) > 1
    model.eval()
    assert len({tuple(mean.tolist()) for mean in model.encode(chunks).mean.detach().round(decimals=4)}) == 1
    # A posterior that is the prior costs the floor for each number, and has no gradient there.
    mean = torch.zeros((1, 8), requires_grad=True)
    posterior = Posterior(mean, torch.zeros(1, 8))
    assert posterior.kl().sum().item() == 0
    by_hand = 0.5 * (0.3**2 + np.exp(0.4) - 1 - 0.4)
    assert Posterior(torch.tensor([[0.3]]), torch.tensor([[0.4]])).kl().item() == pytest.approx(by_hand, rel=1e-5)


def test_autoencoders_are_kept_with_their_tokenizer(autoencoder: ChunkAutoencoder, tmp_path: Path) -> None:
    save_autoencoder(autoencoder, tmp_path, "t")
    back = load_autoencoder(tmp_path, "t")
    for left, right in zip(autoencoder.parameters(), back.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(InputError, match="another tokenizer"):
        load_autoencoder(tmp_path, "u")
    with pytest.raises(NotFoundError, match="no autoencoder"):
        load_autoencoder(tmp_path / "none", "t")


def test_the_future_changes_nothing_before_it(autoencoder: ChunkAutoencoder) -> None:
    model = student(autoencoder).eval()
    ids_BCK = torch.from_numpy(NOISE[:3].astype(np.int64)).reshape(3, 8, CHUNK)
    before = model(ids_BCK)
    for chunk in range(8):
        changed = ids_BCK.clone()
        changed[:, chunk:] = (changed[:, chunk:] + 5) % VOCAB_SIZE
        after = model(changed)
        # Output i predicts chunk i, so outputs up to and with the changed chunk's stay as they were.
        torch.testing.assert_close(after[:, : chunk + 1], before[:, : chunk + 1], rtol=0, atol=1e-6)
        assert (after[:, chunk + 1 :] - before[:, chunk + 1 :]).abs().amax() > 1e-3


def train_steps(model: LatentStudent, data: Sequences, num_steps: int, *, shift: int = 0) -> float:
    """Mean energy a chunk over the last quarter of the steps; `shift` 1 lets every chunk see itself."""
    objective = LatentObjective(SHAPE, LossConfig(), CHUNK)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    if shift:
        forward = model.forward
        model.forward = lambda ids: forward(ids).roll(-shift, 1)  # type: ignore[method-assign]
    energies = []
    for step in range(num_steps):
        numbers = [(step * 16 + offset) % len(data) for offset in range(16)]
        losses = objective.losses(model, data, numbers, None, CPU)
        num_rows = sum(objective.num_rows(data, number) for number in numbers)
        optimizer.zero_grad()
        torch.autograd.backward(losses.total / num_rows)
        optimizer.step()
        energies.append(losses.total.item() / num_rows)
    return float(np.mean(energies[-num_steps // 4 :]))


def noise_floor(autoencoder: ChunkAutoencoder) -> float:
    """Energy of the best that can be drawn without seeing: the vectors of independent chunks."""
    torch.manual_seed(1)
    every = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=CHUNK)))
    drawn = [autoencoder.encode(every[torch.randint(len(every), (4000,))]).sample() for _ in range(2)]
    return (drawn[0] - drawn[1]).norm(dim=-1).mean().item()


def test_noise_stays_noise_and_a_leak_would_show(autoencoder: ChunkAutoencoder) -> None:
    # Fresh noise at every step: nothing can be learnt by heart.
    fresh = sequences(np.random.default_rng(1).integers(0, VOCAB_SIZE, (16 * 120, 16)))
    floor = noise_floor(autoencoder)
    honest = train_steps(student(autoencoder), fresh, 120)
    assert honest > 0.95 * floor
    leaking = train_steps(student(autoencoder), fresh, 120, shift=1)
    assert leaking < 0.9 * floor


def test_a_rule_is_learnt_and_brier_rises(autoencoder: ChunkAutoencoder) -> None:
    model = student(autoencoder)
    data = sequences(CHAIN)
    untrained = evaluate_latent(model, data, range(6), 4, seed=0)
    train_steps(model, data, 250)
    trained = evaluate_latent(model, data, range(6), 4, seed=0)
    assert untrained.num_chunks == trained.num_chunks == 48
    # The first chunk of a sequence cannot be known; the other seven of eight can.
    assert trained.brier[1] > 0.6
    assert trained.brier_lm > untrained.brier_lm + 50
    written = model.generate(
        torch.tensor([[3, 3], [4, 4]]), 3, end_id=11, repeats=3, generator=torch.Generator().manual_seed(0)
    )
    assert written == [5, 5, 6, 6, 7, 7]
    ended = model.generate(torch.tensor([[9, 9], [10, 10]]), 5, end_id=11, repeats=3)
    assert ended == []


def test_the_teachers_part_is_the_first_token_of_each_later_chunk(autoencoder: ChunkAutoencoder) -> None:
    model = student(autoencoder)
    data = sequences(NOISE[:2])
    teacher_NV = torch.randn((15, VOCAB_SIZE), generator=torch.Generator().manual_seed(2))
    following = [torch.from_numpy(NOISE[number, 1:].astype(np.int64)) for number in range(2)]
    scores: list[TokenScores] = [
        scores_from_logits(teacher_NV, next_ids, top_logprobs=11, tail_draws=1) for next_ids in following
    ]
    objective = LatentObjective(
        SHAPE.model_copy(update={"latent_weight": 0.0, "kd_weight": 1.0, "num_samples": 5}), LossConfig(), CHUNK
    )
    torch.manual_seed(7)
    found = objective.losses(model, data, [0, 1], scores, CPU).distillation.item()
    torch.manual_seed(7)
    ids_BCK = torch.from_numpy(NOISE[:2].astype(np.int64)).reshape(2, 8, CHUNK)
    posterior = model.autoencoder.encode(ids_BCK.reshape(16, CHUNK))
    torch.randn((SHAPE.num_targets, *posterior.mean.shape))
    drawn_SNZ = model.sample(model(ids_BCK)[:, :-1].reshape(16, -1), 5)
    mean_NV = model.logits(drawn_SNZ)[..., 0, :].softmax(-1).mean(0).reshape(2, 8, -1)
    expected = 0.0
    for sequence in range(2):
        for chunk in range(1, 8):
            p = teacher_NV[chunk * CHUNK - 1].softmax(-1).double()
            expected += (p * (p.log() - mean_NV[sequence, chunk].double().log())).sum().item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_some_tokens_stand_for_the_vocabulary_in_the_cross_entropy() -> None:
    """Exact with all tokens; with some, what is under the logarithm is right on average over the draws."""
    generator = torch.Generator().manual_seed(0)
    states_NH, weight_VH, bias_V = (torch.randn(shape, generator=generator) for shape in ((3, 8), (400, 8), (400,)))
    ids_N = torch.tensor([7, 399, 7])
    logits_NV = states_NH @ weight_VH.T + bias_V
    sums_N = logits_NV.exp().sum(-1)
    exact_N = sums_N.log() - logits_NV[torch.arange(3), ids_N]
    torch.testing.assert_close(sampled_cross_entropy(states_NH, weight_VH, bias_V, ids_N, 398), exact_N)
    torch.manual_seed(3)
    drawn_DN = torch.stack([sampled_cross_entropy(states_NH, weight_VH, bias_V, ids_N, 100) for _ in range(400)])
    found_DN = (drawn_DN + logits_NV[torch.arange(3), ids_N]).exp() / sums_N
    error = found_DN.std(0) / 400**0.5
    assert (error > 1e-4).all(), "a draw of a quarter differs from draw to draw"
    assert ((found_DN.mean(0) - 1).abs() < 4 * error).all()


def test_the_cross_entropy_is_over_the_decodings_of_a_sample(autoencoder: ChunkAutoencoder) -> None:
    torch.manual_seed(0)
    data = sequences(NOISE[:2])
    model = LatentStudent(SHAPE, autoencoder, 8, torch.from_numpy(data.log_shares(VOCAB_SIZE)))
    # Without noise a sample hangs on the text alone.
    model.noise.weight.data.zero_()
    shape = SHAPE.model_copy(update={"latent_weight": 0.0, "ce_weight": 1.0})
    found = LatentObjective(shape, LossConfig(), CHUNK).losses(model, data, [0, 1], None, CPU).total.item()
    ids_BCK = torch.from_numpy(NOISE[:2].astype(np.int64)).reshape(2, 8, CHUNK)
    codes = autoencoder.decode(model.sample(model(ids_BCK)[:, :-1], 2)[0])
    logits_BCKV = codes * np.exp(-1) + model.log_shares_V
    by_hand = -logits_BCKV.log_softmax(-1).gather(-1, ids_BCK[..., None]).sum().item()
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_shares_are_counted_over_text_and_not_over_filling() -> None:
    data = Sequences(
        np.array([[1, 1, 1, 2], [2, 0, 0, 0]], np.int32), np.array([[0, 0, 0, 0], [0, -1, -1, -1]], np.int32)
    )
    # A twentieth of a time is added to each: 5 + 4 / 20 in all.
    expected = np.log(np.array([0.05, 3.05, 2.05, 0.05]) / 5.2)
    np.testing.assert_allclose(data.log_shares(4), expected, rtol=1e-6)


def test_tokens_are_drawn_as_often_as_the_decoder_says(autoencoder: ChunkAutoencoder) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(6000, 4)
    shares = draw_tokens(logits, generator).bincount(minlength=4) / 6000
    assert shares[1] == 0
    assert shares.tolist() == pytest.approx([0.5, 0.0, 0.3, 0.2], abs=0.02)
    model = student(autoencoder).eval()
    model.config = SHAPE.model_copy(update={"token_choice": "drawn"})
    hidden_1H = torch.zeros(1, SHAPE.hidden_size)
    first_S = model.sample_chunks(hidden_1H, 6000, generator)[:, 0, 0]
    # The chance of a token is the mean of its probabilities over the vectors.
    expected_V = model.logits(model.sample(hidden_1H, 6000, generator))[:, 0, 0].softmax(-1).mean(0)
    assert (first_S.bincount(minlength=VOCAB_SIZE) / 6000).tolist() == pytest.approx(expected_V.tolist(), abs=0.03)


def test_energy_by_hand_and_its_gradient_at_equal_samples() -> None:
    samples = torch.tensor([[[0.0]], [[2.0]]])
    targets = torch.tensor([[[1.0]], [[5.0]]])
    # Distances to targets 1, 5, 1, 3: mean 2.5; between the samples 2: 2 * 2.5 - 2.
    assert energy_loss(samples, targets).item() == pytest.approx(3.0)
    assert energy_loss(samples, targets, 0.5).item() == pytest.approx(
        2 * np.mean([1, 5**0.5, 1, 3**0.5]) - 2**0.5, rel=1e-6
    )
    same = torch.zeros((3, 1, 4), requires_grad=True)
    energy_loss(same, torch.ones((2, 1, 4))).sum().backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_the_energy_is_least_for_the_targets_own_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn((200, 1, 3), generator=generator)

    def energy(scale: float, offset: float) -> float:
        return energy_loss(torch.randn((200, 1, 3), generator=generator) * scale + offset, targets).item()

    honest = energy(1, 0)
    assert honest < energy(0.3, 0)
    assert honest < energy(2, 0)
    assert honest < energy(1, 0.7)


def test_brier_is_unbiased_and_by_hand() -> None:
    truth = torch.tensor([[0, 1]])
    # Both draws right: 1 + 1 - 1. One right: 1 + 0 - 0. Equal and wrong: -1.
    assert brier_scores(truth, truth, truth).tolist() == [1.0, 1.0]
    assert brier_scores(truth, torch.tensor([[0, 2]]), truth).tolist() == [1.0, 1.0]
    assert brier_scores(torch.tensor([[2, 2]]), torch.tensor([[2, 2]]), truth).tolist() == [-1.0, -1.0]
    p = np.array([0.5, 0.3, 0.2])
    pairs = list(itertools.product(range(3), repeat=2))
    for token in range(3):
        expected = sum(
            p[a] * p[b] * brier_scores(*(torch.tensor([[one]]) for one in (a, b, token)))[0].item() for a, b in pairs
        )
        assert expected == pytest.approx(2 * p[token] - (p**2).sum())
    assert brier_lm(torch.tensor([0.5, 0.25, 0.125, 0.0625])) == pytest.approx(100 * 2**-2.5)
    assert brier_lm(torch.tensor([0.5, -0.1])) == 0.0


def test_choices_below_temperature_one_follow_the_counts() -> None:
    drawn = [(1,)] * 4 + [(2,)] * 2 + [(3,)]
    generator = torch.Generator().manual_seed(0)
    # C(4, 2) = 6 against C(2, 2) = 1 and none for the single one.
    counts = Counter(choose_chunk(drawn, 2, generator) for _ in range(700))
    assert counts[(3,)] == 0
    assert counts[(1,)] / 700 == pytest.approx(6 / 7, abs=0.06)
    # None was seen five times: four is the most that was.
    assert choose_chunk(drawn, 5, generator) == (1,)


def test_chunks_that_were_filled_up_do_not_count() -> None:
    config = PackConfig(sequence_tokens=8, chunk_tokens=2, validation_share=0.0)
    pack = pack_documents(
        [Document("a", "t", "abcdefghijkl")], lambda t: [ord(c) - 97 for c in t], config,
        end_id=11, vocab_size=12, tokenizer_sha256="t",
    )  # fmt: skip
    assert pack.train.documents_ST[1].tolist() == [0] * 5 + [-1] * 3
    assert LatentObjective(SHAPE, LossConfig(), 2).num_rows(pack.train, 1) == 2
    assert len(aligned_chunks(pack.train, 2)) == 6


def test_leaks_are_seen_by_the_guard_that_looks_for_them() -> None:
    # The original's decoder attends to its own input as memory without a mask.
    layer = nn.TransformerDecoderLayer(16, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(1, 4, 16)
    changed = x.clone()
    changed[:, 3] += 1
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    before, after = layer(x, x, tgt_mask=mask), layer(changed, changed, tgt_mask=mask)
    assert (before[:, :3] - after[:, :3]).abs().max() > 1e-3
