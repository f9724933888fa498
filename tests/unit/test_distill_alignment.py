"""Two tokenizers over one text: grouping by bytes, the map between vocabularies, and what is learnt from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparkray.config.distill import LossConfig
from sparkray.distill.alignment.fingerprint import load_tokenizer, require_same_tokenizer, tokenizer_sha256
from sparkray.distill.alignment.pieces import token_pieces, vocabulary_pieces
from sparkray.distill.alignment.project import (
    align_scores,
    map_vocabularies,
    require_coverage,
    span_losses,
    uncommon_losses,
)
from sparkray.distill.alignment.spans import SpanGroup, align_pieces, share_one_to_one
from sparkray.distill.alignment.teacher import AlignedTeacher
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.losses import distillation_loss
from sparkray.distill.scores import TokenScores, head_only
from sparkray.distill.targets import target_rows
from sparkray.errors import InputError, NotFoundError

CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café — 東京 🦊", "def f(x):\n    return x ** 2\n"] * 4


def byte_level(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for token in ["▁", "t", "h", "e", "▁t", "he", "▁the", "q", "u", "i", "c", "k", "qu", "ick", "▁qu"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("q", "u"), ("▁", "qu")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


FINE, COARSE, MARKED = byte_level(280), byte_level(340), sentencepiece_like()
TOKENIZERS = {"fine": FINE, "coarse": COARSE, "marked": MARKED}
PIECES = {name: vocabulary_pieces(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def pieces_of(name: str, text: str) -> list[bytes]:
    return token_pieces(text.encode(), TOKENIZERS[name].encode(text).ids, PIECES[name])


# Metaspace turns its own mark into a space, so a text that holds it is changed before it is cut.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=40)


@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from(list(TOKENIZERS)))
def test_pieces_spell_any_text(text: str, name: str) -> None:
    assert b"".join(pieces_of(name, text)) == text.encode()


@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from(list(TOKENIZERS)), st.sampled_from(list(TOKENIZERS)))
def test_groups_cover_both_sides_and_agree_only_at_their_edges(text: str, left: str, right: str) -> None:
    teacher, student = pieces_of(left, text), pieces_of(right, text)
    groups = align_pieces(teacher, student)
    assert [token for group in groups for token in range(group.teacher_start, group.teacher_stop)] == list(
        range(len(teacher))
    )
    assert [token for group in groups for token in range(group.student_start, group.student_stop)] == list(
        range(len(student))
    )
    for group in groups:
        ours = teacher[group.teacher_start : group.teacher_stop]
        theirs = student[group.student_start : group.student_stop]
        assert b"".join(ours) == b"".join(theirs)
        assert group.num_bytes == len(b"".join(ours))
        inner = [set(np.cumsum([len(piece) for piece in side if piece])[:-1].tolist()) for side in (ours, theirs)]
        assert not inner[0] & inner[1]
    if left == right:
        assert share_one_to_one(groups) == 1.0


def test_groups_by_hand() -> None:
    assert align_pieces([b"ab", b"c", b"de"], [b"a", b"bc", b"de"]) == [
        SpanGroup(0, 2, 0, 2, 3),
        SpanGroup(2, 3, 2, 3, 2),
    ]
    assert share_one_to_one(align_pieces([b"ab", b"c", b"de"], [b"a", b"bc", b"de"])) == pytest.approx(0.4)
    # Ends of text pair with each other; one without a partner joins the group before it, or the first one.
    assert align_pieces([b"a", b"", b"b"], [b"a", b"", b"b"])[1] == SpanGroup(1, 2, 1, 2, 0)
    assert align_pieces([b"a", b"", b"b"], [b"a", b"b"]) == [SpanGroup(0, 2, 0, 1, 1), SpanGroup(2, 3, 1, 2, 1)]
    assert align_pieces([b"", b"a"], [b"a"]) == [SpanGroup(0, 2, 0, 1, 1)]
    assert align_pieces([b""], []) == [SpanGroup(0, 1, 0, 0, 0)]
    assert align_pieces([], []) == []
    with pytest.raises(InputError, match="different texts"):
        align_pieces([b"a"], [b"b"])


def test_half_characters_have_their_own_bytes() -> None:
    fox = "🦊".encode()
    for name in TOKENIZERS:
        assert b"".join(pieces_of(name, "🦊")) == fox
    # The four byte tokens all decode to a replacement character, and are four different pieces.
    assert [PIECES["marked"][1 + byte] for byte in fox] == [bytes([byte]) for byte in fox]


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(InputError, match="changes it first"):
        token_pieces(b"abc", [PIECES["fine"].index(b"a")], PIECES["fine"])


def test_identity_is_what_decides_ids(tmp_path: Path) -> None:
    FINE.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    again.enable_truncation(5)
    assert tokenizer_sha256(again) == tokenizer_sha256(FINE)
    again.add_tokens(["another"])
    assert tokenizer_sha256(again) != tokenizer_sha256(FINE)
    require_same_tokenizer("a" * 64, "a" * 64)
    with pytest.raises(InputError, match="do not name the same tokens"):
        require_same_tokenizer("a" * 64, "b" * 64)
    with pytest.raises(NotFoundError):
        load_tokenizer(tmp_path / "none")


def scores_of(head: list[list[tuple[int, float]]], token: list[float]) -> TokenScores:
    return head_only(
        np.array([[i for i, _ in row] for row in head], np.int32),
        np.log(np.array([[p for _, p in row] for row in head], np.float32)),
        np.log(np.array(token, np.float32)),
    )


TEACHER_PIECES = [b"", b"a", b"b", b"ab", b"cd"]
STUDENT_PIECES = [b"a", b"b", b"c", b"d", b"", b"xy"]


def test_rows_are_carried_over_by_bytes() -> None:
    vocabularies = map_vocabularies(TEACHER_PIECES, STUDENT_PIECES, special=[(0, 4)])
    assert vocabularies.student_of_teacher.tolist() == [4, 0, 1, -1, -1]
    assert vocabularies.uncommon_student.tolist() == [False, False, True, True, False, True]
    # "a" "b" "cd" against "a" "b" "c" "d": rows for "b" (one to one) and for "cd" (a span of two student tokens).
    groups = align_pieces([b"a", b"b", b"cd"], [b"a", b"b", b"c", b"d"])
    scores = scores_of([[(3, 0.5), (2, 0.3), (1, 0.1)], [(4, 0.6), (1, 0.2), (2, 0.1)]], [0.3, 0.6])
    aligned = align_scores(scores, groups, vocabularies)
    assert aligned.rows.tolist() == [0]
    assert aligned.head.head_ids_LK.tolist() == [[1, 0, -1]]
    np.testing.assert_allclose(np.exp(aligned.head.head_logprobs_LK), [[0.3, 0.1, 0.0]], rtol=1e-6)
    assert aligned.head.tail_mass[0] == pytest.approx(0.6, rel=1e-5)
    np.testing.assert_allclose(np.exp(aligned.uncommon_logprobs_LU), [[0.5, 0.0, 0.0]], rtol=1e-6)
    assert (aligned.span_starts.tolist(), aligned.span_stops.tolist()) == ([1], [3])
    assert aligned.span_logprobs[0] == pytest.approx(math.log(0.6))
    assert aligned.byte_share == pytest.approx(0.5)
    assert aligned.mass_share == pytest.approx(0.4 / 0.9, rel=1e-5)
    require_coverage(aligned, 0.4)
    with pytest.raises(InputError, match=r"44\.4% of the teacher's probability"):
        require_coverage(aligned, 0.5)

    # The student gives "c" 0.5 and then "d" 0.8: the span has 0.4 against the teacher's 0.6.
    losses = span_losses(torch.tensor([0.9, 0.5, 0.8]).log(), aligned)
    assert losses.item() == pytest.approx(0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6), rel=1e-5)
    # The student's uncommon tokens c, d, xy have 0.1, 0.25, 0.05 at that row: sorted 0.25, 0.1, 0.05 against 0.5, 0, 0.
    probabilities = torch.tensor([[0.3, 0.2, 0.1, 0.25, 0.1, 0.05]])
    assert uncommon_losses(probabilities.log(), aligned, vocabularies).item() == pytest.approx(0.4, rel=1e-5)


def test_a_span_that_both_are_sure_of_costs_nothing_and_stays_finite() -> None:
    vocabularies = map_vocabularies(TEACHER_PIECES, STUDENT_PIECES)
    groups = align_pieces([b"a", b"cd"], [b"a", b"c", b"d"])
    aligned = align_scores(scores_of([[(4, 1.0)]], [1.0]), groups, vocabularies)
    student = torch.zeros(2, requires_grad=True)
    loss = span_losses(student, aligned)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


class SpellingTeacher:
    """Gives the token that follows half of the probability, and three fixed others the rest of the head."""

    parameters, max_model_tokens = "p", 1000
    identity = TeacherIdentity("m", "", "", "theirs", "", "", "", "")

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def score(self, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
        self.asked.append(list(token_ids))
        heads = []
        for token in token_ids[1:]:
            others = [other for other in (10, 11, 12, 13) if other != token][:3]
            heads.append([(token, 0.5), *((other, 0.1) for other in others)])
        return scores_of(heads, [0.5] * len(heads))

    def close(self) -> None:
        pass


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 3))
def test_a_teacher_of_another_tokenizer_answers_in_the_students_ids(parts: list[str], cut: int, cut_end: int) -> None:
    end = FINE.token_to_id("<|end|>")
    inner = SpellingTeacher()
    aligned = AlignedTeacher(
        inner,
        lambda text: COARSE.encode(text).ids,
        PIECES["coarse"],
        PIECES["fine"],
        (COARSE.token_to_id("<|end|>"), end),
        "ours",
        min_mass_share=0.0,
    )
    ids = [token for part in parts for token in [*FINE.encode(part).ids, end]]
    # A sequence may begin and end in the middle of a character.
    ids = ids[cut : len(ids) - cut_end]
    if len(ids) < 2:
        return
    scores = aligned.score(ids, 4).checked(len(ids) - 1)
    for row, token in enumerate(ids[1:]):
        found = scores.head_ids_LK[row].tolist()
        if found[0] >= 0:
            # The likeliest is what follows, in the student's own ids.
            assert found[0] == token
            assert scores.head_logprobs_LK[row, 0] == pytest.approx(math.log(0.5))
        else:
            assert found == [-1] * 4
            assert scores.tail_mass[row] == 1.0
    assert aligned.identity.tokenizer_sha256 == "ours"


def test_rows_without_a_counterpart_teach_nothing() -> None:
    rows = target_rows(
        [head_only(np.full((2, 3), -1, np.int32), np.full((2, 3), -np.inf, np.float32), np.zeros(2, np.float32))]
    )
    logits = torch.randn((2, 7), generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = distillation_loss(logits, rows, LossConfig(target="tail_bucket"))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6
