"""Packs of real text, and the store of a teacher's rows: what is written comes back, and what changed is seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.config.distill import PackConfig, StoreConfig
from sparkray.distill.data.pack import Pack, pack_documents, read_pack, write_pack
from sparkray.distill.data.sources import Document, read_documents, toy_documents, write_documents
from sparkray.distill.errors import TeacherReplyError
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores
from sparkray.distill.store.capture import capture_store, store_header
from sparkray.distill.store.manifest import read_manifest
from sparkray.distill.store.reader import LogitStore
from sparkray.distill.store.shards import read_shard, shard_name, write_shard
from sparkray.errors import InputError, NotFoundError, UsageError

IDENTITY = TeacherIdentity("m", "", "", "t", "e", "float32", "local", "forward")
END = 256


def encode(text: str) -> list[int]:
    return list(text.encode())


def pack_of(texts: Sequence[str], **values: object) -> Pack:
    documents = [Document(str(number), "test", text) for number, text in enumerate(texts)]
    config = PackConfig.model_validate({"sequence_tokens": 8, "chunk_tokens": 2, "validation_share": 0.0, **values})
    return pack_documents(documents, encode, config, end_id=END, vocab_size=257, tokenizer_sha256="t")


def test_documents_end_and_nothing_is_predicted_across_the_border() -> None:
    pack = pack_of(["abc", "defgh"])
    assert pack.train.ids_ST.tolist() == [[97, 98, 99, END, 100, 101, 102, 103]]
    assert pack.train.row_mask(0).tolist() == [True, True, True, False, True, True, True]
    longer = pack_of(["abc", "defghijk"])
    assert longer.train.ids_ST[1].tolist() == [104, 105, 106, 107, END, END, END, END]
    assert longer.train.documents_ST[1].tolist() == [1, 1, 1, 1, 1, -1, -1, -1]
    assert longer.train.row_mask(1).tolist() == [True, True, True, True, False, False, False]
    assert longer.train.tokens(1) == [104, 105, 106, 107, END]
    assert longer.train.num_tokens == 13


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=30), min_size=2, max_size=12), st.floats(0, 0.9))
def test_every_document_is_on_one_side(texts: list[str], share: float) -> None:
    try:
        pack = pack_of(texts, validation_share=share)
    except InputError:
        return
    train, held_out = (set(part.documents_ST.ravel().tolist()) - {-1} for part in (pack.train, pack.validation))
    assert not train & held_out
    total = sum(len(text) + 1 for text in texts)
    # At most a chunk is dropped at the end of each part.
    assert total - 2 * 2 <= pack.train.num_tokens + pack.validation.num_tokens <= total
    if share > 0:
        assert held_out


def test_a_text_shorter_than_a_chunk_is_refused() -> None:
    with pytest.raises(InputError, match="make 2 tokens, and more than one chunk of 2"):
        pack_of(["a"])


def test_packs_come_back(tmp_path: Path) -> None:
    pack = pack_of(["abcdefgh" * 3, "xyz" * 5], validation_share=0.5)
    write_pack(pack, tmp_path)
    back = read_pack(tmp_path)
    assert back.header == pack.header
    np.testing.assert_array_equal(back.train.ids_ST, pack.train.ids_ST)
    np.testing.assert_array_equal(back.validation.documents_ST, pack.validation.documents_ST)
    with pytest.raises(NotFoundError, match=r"no pack\.json"):
        read_pack(tmp_path / "none")


def test_sources_are_real_text_and_files_are_read_strictly(tmp_path: Path) -> None:
    topics = read_documents("python-docs")
    assert "assert" in {document.name for document in topics}
    assert sum(len(document.text) for document in topics) > 300_000
    assert {document.source for document in toy_documents()} == {"python-docs", "python-stdlib"}
    path = tmp_path / "d.jsonl"
    write_documents(toy_documents(), path)
    assert read_documents(str(path)) == toy_documents()
    path.write_text('{"content": "a"}\n\n{"nothing": 1}\n')
    with pytest.raises(InputError, match="line 3"):
        read_documents(str(path))
    path.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1"):
        read_documents(str(path))
    with pytest.raises(NotFoundError, match="python-stdlib"):
        read_documents("nothing-here")


class Scorer:
    """Rows made from the tokens alone, so that order and repetition change nothing."""

    def __init__(self, *, shift: float = 0.0, fail_at: int | None = None, vocab_size: int = 257) -> None:
        self.calls = 0
        self.shift, self.fail_at, self.vocab_size = shift, fail_at, vocab_size

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        if self.calls == self.fail_at:
            raise RuntimeError("killed")
        self.calls += 1
        return [self.one(tokens) for tokens in sequences]

    def one(self, tokens: Sequence[int]) -> TokenScores:
        generator = np.random.default_rng(list(tokens))
        num_rows = len(tokens) - 1
        logprobs = -np.sort(generator.exponential(2, (num_rows, 3)), axis=1) - 2 - self.shift
        ids = np.array([generator.permutation(self.vocab_size)[:3] for _ in range(num_rows)])
        return TokenScores(
            ids.astype(np.int32),
            logprobs.astype(np.float32),
            logprobs[:, 0].astype(np.float32),
            generator.integers(0, self.vocab_size, (num_rows, 2)).astype(np.int32),
            generator.random(num_rows).astype(np.float32),
        )


CONFIG = StoreConfig(top_logprobs=3, tail_draws=2, shard_sequences=2)
PACK = pack_of(["the quick brown fox", "jumps over", "the lazy dog" * 3])


def test_rows_come_back_to_half_precision(tmp_path: Path) -> None:
    header = store_header(PACK, IDENTITY, CONFIG)
    manifest = capture_store(tmp_path, PACK, header, Scorer())
    store = LogitStore(tmp_path, PACK)
    assert len(PACK.train) == 9
    assert [len(header.shard_range(shard)) for shard in range(header.num_shards)] == [2, 2, 2, 2, 1]
    for sequence in range(len(PACK.train)):
        expected, found = Scorer().one(PACK.train.tokens(sequence)), store[sequence]
        np.testing.assert_array_equal(found.head_ids_LK, expected.head_ids_LK)
        np.testing.assert_array_equal(found.tail_ids_LM, expected.tail_ids_LM)
        for kept, true in (
            (found.head_logprobs_LK, expected.head_logprobs_LK),
            (found.token_logprobs_L, expected.token_logprobs_L),
            (found.entropy_L, expected.entropy_L),
        ):
            np.testing.assert_allclose(kept, true, rtol=2**-11)
    assert store.max_difference(Scorer(), [0, 5]) < 0.01
    assert store.max_difference(Scorer(shift=1), [0, 5]) == pytest.approx(1, abs=0.01)
    sizes = sum((tmp_path / shard_name(shard)).stat().st_size for shard in range(5))
    assert manifest.bytes_per_token == sizes / PACK.train.num_tokens
    assert json.loads((tmp_path / "manifest.json").read_text())["store_id"] == header.store_id


@pytest.mark.parametrize("vocab_size", [257, 100_000])
def test_values_in_any_order_come_back_bit_by_bit(tmp_path: Path, vocab_size: int) -> None:
    generator = np.random.default_rng(0)
    header = replace(store_header(PACK, IDENTITY, CONFIG), vocab_size=vocab_size, num_sequences=1)
    tokens = PACK.train.tokens(0)
    num_rows = len(tokens) - 1
    logprobs = generator.choice(np.float16([-np.inf, -0.0, -1e-7, -1, -6e4]), (num_rows, 3)).astype(np.float32)
    ids, draws = (generator.integers(0, vocab_size, (num_rows, width)).astype(np.int32) for width in (3, 4))
    scores = TokenScores(ids, logprobs, logprobs[:, 0], draws, np.full(num_rows, np.nan, np.float32))
    entry = write_shard(tmp_path, header, 0, [tokens], [scores])
    _, found = read_shard(tmp_path, header, entry)[0]
    np.testing.assert_array_equal(found.head_logprobs_LK, logprobs)
    np.testing.assert_array_equal(found.head_ids_LK, ids)
    np.testing.assert_array_equal(found.tail_ids_LM, draws)


def test_entries_that_do_not_exist_come_back_as_such(tmp_path: Path) -> None:
    for vocab_size in (257, 100_000):

        def short(sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
            made = Scorer()(sequences)
            for one in made:
                one.head_ids_LK[:, 2], one.head_logprobs_LK[:, 2] = -1, -np.inf
            return made

        header = replace(store_header(PACK, IDENTITY, CONFIG), vocab_size=vocab_size)
        capture_store(tmp_path / str(vocab_size), PACK, header, short)
        found = LogitStore(tmp_path / str(vocab_size), PACK)[4]
        assert (found.head_ids_LK[:, 2] == -1).all()
        assert np.isneginf(found.head_logprobs_LK[:, 2]).all()
        assert (found.head_ids_LK[:, :2] >= 0).all()


def test_a_killed_capture_goes_on_and_changed_files_are_made_again(tmp_path: Path) -> None:
    header = store_header(PACK, IDENTITY, CONFIG)
    with pytest.raises(RuntimeError):
        capture_store(tmp_path, PACK, header, Scorer(fail_at=3))
    with pytest.raises(NotFoundError, match="not finished"):
        LogitStore(tmp_path, PACK)
    rest = Scorer()
    first = capture_store(tmp_path, PACK, header, rest)
    assert rest.calls == 2
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="its hash differs"):
        LogitStore(tmp_path, PACK)[2]
    again = Scorer()
    assert capture_store(tmp_path, PACK, header, again) == first
    assert again.calls == 1


def test_a_store_belongs_to_its_settings_and_its_corpus(tmp_path: Path) -> None:
    header = store_header(PACK, IDENTITY, CONFIG)
    capture_store(tmp_path, PACK, header, Scorer())
    other = replace(header, teacher=replace(IDENTITY, dtype="bfloat16"), seed=7)
    with pytest.raises(UsageError, match=r"other settings: teacher .*seed \(0 there\)"):
        capture_store(tmp_path, PACK, other, Scorer())
    assert other.store_id != header.store_id
    with pytest.raises(InputError, match="another corpus"):
        LogitStore(tmp_path, pack_of(["another text", "altogether"]))
    with pytest.raises(NotFoundError, match="no logit store"):
        read_manifest(tmp_path / "none")


def test_answers_that_cannot_be_are_not_stored(tmp_path: Path) -> None:
    def broken(sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        return [replace(one, head_logprobs_LK=one.head_logprobs_LK * np.nan) for one in Scorer()(sequences)]

    with pytest.raises(TeacherReplyError, match="NaN"):
        capture_store(tmp_path, PACK, store_header(PACK, IDENTITY, CONFIG), broken)
    assert not list(tmp_path.glob("*.parquet"))
