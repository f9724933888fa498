"""The chain-of-thought boost: which tokens, when, how much, and never what is forbidden."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from sparkray.metis.boost import BoostTable, apply_boost
from sparkray.metis.detectors import DetectorBank
from sparkray.metis.entropy import EntropyStats
from sparkray.metis.fields import COLUMN
from sparkray.metis.options import WatchOptions
from sparkray.metis.rules import CAREFUL, PUBLISHED

TEXT = (
    "Let| Let|Wait| Wait|Act|ually| Actually|However| However|But| But|On| On|Consider| Consider|First| First|"
    "Second| Second|There|fore| Therefore|Because| Because|Since| Since|If| If|Suppose| Suppose|Assume| Assume|'s|"
    "Step| Step|Note| Note|Important| Important|Key| Key|Al|ternatively| Al|\n\n| me| think| the| other| hand| we|"
    ' that|.|!|?|."| x|\n|...|,| 3.|word'
)
PUBLISHED_TEXT = (
    "Let|Wait|Act|However|But|On|Consider|First|Second|There|Because|Since|If|Suppose|Assume|Step|Note|Important|Key|Al"
    "|\n\n"
)
WORDS = tuple(TEXT.split("|"))


class WordTokenizer:
    """Longest match first over `WORDS`."""

    def __len__(self) -> int:
        return len(WORDS)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        ids = []
        while text:
            word = max((word for word in WORDS if text.startswith(word)), key=len)
            ids.append(WORDS.index(word))
            text = text[len(word) :]
        return ids

    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(WORDS[token_id] for token_id in sequence) for sequence in sequences]


@pytest.fixture(scope="module")
def table() -> BoostTable:
    return BoostTable(WordTokenizer())


def words(token_ids: torch.Tensor) -> set[str]:
    return {WORDS[token_id] for token_id in token_ids.tolist()}


def test_published_is_the_first_token_of_each_phrase_without_a_space(table: BoostTable) -> None:
    assert words(table.published_K) == set(PUBLISHED_TEXT.split("|"))
    assert table.published_K.tolist() == sorted(set(table.published_K.tolist()))


def test_careful_takes_both_forms_and_no_fragments(table: BoostTable) -> None:
    found = words(table.careful_K)
    assert {"Wait", " Wait", " Actually", "But", " But", " Therefore"} <= found
    assert not found & {"Act", "There", "Al", " Al", "\n\n"}, "the beginning of a longer word is not that word"


def test_ends_of_sentences(table: BoostTable) -> None:
    texts = [".", "!", "?", '."', "\n", "\n\n", "...", ",", " x", "word", " 3.", "Wait"]
    ids = torch.tensor([WORDS.index(text) for text in texts])
    assert table.ends_sentence(ids).tolist() == [True] * 7 + [False] * 3 + [True, False]


def test_each_row_gets_its_own_bonus_on_its_own_table(table: BoostTable) -> None:
    logits = torch.randn(4, len(WORDS), generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    modes = torch.tensor([PUBLISHED, CAREFUL, PUBLISHED, 0], dtype=torch.float64)
    bonus = torch.tensor([5.0, 2.0, 0.0, 7.0], dtype=torch.float64)
    assert apply_boost(logits, None, modes, bonus, table) is logits
    wanted = before.clone()
    for token_id in table.published_K.tolist():
        wanted[0, token_id] += 5.0
    for token_id in table.careful_K.tolist():
        wanted[1, token_id] += 2.0
    assert torch.equal(logits, wanted)


def test_named_rows_alone_are_touched(table: BoostTable) -> None:
    logits = torch.zeros(5, len(WORDS))
    apply_boost(
        logits, torch.tensor([3, 1]), torch.tensor([1.0, 2.0]), torch.tensor([5.0, 2.0], dtype=torch.float64), table
    )
    assert logits[[0, 2, 4]].abs().sum() == 0
    assert logits[3].sum() == 5.0 * len(table.published_K)
    assert logits[1].sum() == 2.0 * len(table.careful_K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, [0, 1]])
def test_a_forbidden_token_stays_forbidden(table: BoostTable, dtype: torch.dtype, rows: list[int] | None) -> None:
    logits = torch.zeros(2, len(WORDS), dtype=dtype)
    logits[:, ::2] = -math.inf
    modes, bonus = torch.tensor([float(PUBLISHED), float(CAREFUL)]), torch.tensor([5.0, 5.0])
    apply_boost(logits, None if rows is None else torch.tensor(rows), modes, bonus, table)
    assert (logits[:, ::2] == -math.inf).all()
    assert not logits.isnan().any()
    assert (logits[:, 1::2] == 5.0).any()


def test_the_bonus_follows_the_recorded_tokens() -> None:
    bank = DetectorBank(3, "cpu")
    for row, boost in enumerate(("off", "published", "careful")):
        bank.reset(row, WatchOptions(boost=boost, boost_bonus=1.5 * row))
    tokens = torch.zeros(2, 8)
    tokens[:, COLUMN["boosted"]] = torch.tensor([1.0, 0.0])
    mode, bonus = bank.boost_bonus(torch.tensor([2, 1]), tokens)
    assert mode.tolist() == [CAREFUL, PUBLISHED]
    assert bonus.tolist() == [3.0, 0.0]


class CarefulRun:
    """One careful row; entropy 0.5 throughout but for alarms."""

    def __init__(self) -> None:
        self.bank = DetectorBank(1, "cpu")
        # Every z above the drift is an alarm at once, so a test says itself where alarms are.
        self.bank.reset(0, WatchOptions(hedge=1e-6, refuse=1e9, boost="careful", boost_bonus=2.0))
        self.num_tokens = 0

    def token(self, *, alarm: bool = False, sentence_end: bool = False) -> bool:
        # A peak that grows with the stream is always above the drift; 0.5 never is.
        entropy = 4.0 + self.num_tokens / 50 if alarm else 0.5
        self.num_tokens += 1
        row = self.bank.observe(
            torch.tensor([0]),
            EntropyStats(torch.tensor([entropy]), torch.tensor([0.5])),
            49_152,
            None,
            torch.tensor([sentence_end]),
        )[0]
        assert bool(row[COLUMN["action"]] > 0) is alarm
        return bool(row[COLUMN["boosted"]])


def test_careful_waits_for_the_end_of_a_sentence_and_boosts_once() -> None:
    run = CarefulRun()
    boosted = [run.token(sentence_end=True) for _ in range(30)]
    boosted += [run.token(alarm=True)] + [run.token() for _ in range(10)]
    boosted += [run.token(sentence_end=True), run.token(sentence_end=True), run.token(sentence_end=True)]
    assert [at for at, on in enumerate(boosted) if on] == [41]


def test_careful_gives_up_after_fifty_tokens() -> None:
    for wait, expected in ((49, True), (50, False)):
        run = CarefulRun()
        for _ in range(30):
            run.token()
        run.token(alarm=True)
        for _ in range(wait - 1):
            assert not run.token()
        assert run.token(sentence_end=True) is expected


def test_careful_rests_for_forty_tokens() -> None:
    for wait, expected in ((40, False), (41, True)):
        run = CarefulRun()
        for _ in range(30):
            run.token()
        assert run.token(alarm=True, sentence_end=True)
        for _ in range(wait - 1):
            assert not run.token()
        assert run.token(alarm=True, sentence_end=True) is expected


def test_careful_acts_three_times_at_most() -> None:
    run = CarefulRun()
    boosts = []
    for _ in range(6):
        for _ in range(60):
            run.token()
        boosts.append(run.token(alarm=True, sentence_end=True))
    assert boosts == [True, True, True, False, False, False]


def test_careful_without_knowledge_of_sentences_never_acts() -> None:
    bank = DetectorBank(1, "cpu")
    bank.reset(0, WatchOptions(hedge=1e-6, refuse=1e9, boost="careful", boost_bonus=2.0))
    for entropy in [0.5] * 20 + [9.0] + [0.5] * 60:
        row = bank.observe(torch.tensor([0]), EntropyStats(torch.tensor([entropy]), torch.tensor([0.5])), 49_152)[0]
        assert row[COLUMN["boosted"]] == 0
