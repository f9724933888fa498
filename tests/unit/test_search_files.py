"""What a search reads and writes: recordings, kept events, prompts, forks, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_paths import INFO, ended, path, toy_questions

from sparkray.config.search import SearchConfig
from sparkray.errors import InputError, NotFoundError
from sparkray.search.answers import Answer
from sparkray.search.events import PruneEvent
from sparkray.search.forks import fork_length, survivors
from sparkray.search.paths import FinishReason, Lane
from sparkray.search.policies import DeepConfOnline
from sparkray.search.prompting import BLOCK_TOKENS, prompt_ids, settle
from sparkray.search.recording import RecordedQuestion, read_recording, write_recording
from sparkray.search.replay_events import replay_events
from sparkray.search.replay_file import read_replay, write_replay
from sparkray.search.report import build_report
from sparkray.search.tasks import TASKS, find_task
from sparkray.search.votes import vote


def test_a_recording_survives_the_file(tmp_path: Path) -> None:
    questions = toy_questions(3, 0) + toy_questions(2, 1, split="held_out")
    write_recording(tmp_path / "paths.parquet", INFO, questions)
    read = read_recording(tmp_path / "paths.parquet", {"toy": "text"})
    assert read.info == INFO
    assert read.tasks == ("toy",)
    assert [question.index for question in read.select("held_out")] == [0, 1]
    for before, after in zip(questions, read.questions, strict=True):
        assert after.correct == before.correct
        assert after.prompt == before.prompt
        for one, other in zip(before.paths, after.paths, strict=True):
            assert other.token_ids == one.token_ids
            assert other.answer is not None
            assert one.answer is not None
            assert other.answer.key == one.answer.key
            # float16 keeps three digits.
            np.testing.assert_allclose(other.signals, one.signals, rtol=1e-3)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a parquet file at all"])
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "paths.parquet").write_bytes(content)
    with pytest.raises(InputError, match="is not a recording of paths"):
        read_recording(tmp_path / "paths.parquet")
    with pytest.raises(NotFoundError, match="there is no recording"):
        read_recording(tmp_path / "other.parquet")


def test_right_answers_are_known_by_key() -> None:
    question = toy_questions(1, 0)[0]
    assert question.is_right("right")
    assert not question.is_right("never given")
    assert not question.is_right(None)


def test_kept_events_survive_the_file(tmp_path: Path) -> None:
    events = [{"kind": "wave", "wave": 0, "paths": [0]}, {"kind": "done", "report": {}}]
    write_replay(tmp_path / "search.json", "why?", events)
    assert read_replay(tmp_path / "search.json")["events"] == events
    (tmp_path / "search.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="not a recorded search"):
        read_replay(tmp_path / "search.json")
    with pytest.raises(NotFoundError):
        read_replay(tmp_path / "none.json")


def test_a_recorded_question_is_replayed_event_by_event() -> None:
    found = (path("a", 3, entropy=[1.0, 2.0, 3.0], top_confidence=1.0), path("b", 5, top_confidence=-1.0), path("a", 4))
    question = RecordedQuestion("toy", "held_out", 0, "Question: why?\nAnswer:", found, (True, False, True))
    policy = DeepConfOnline(warm_up=1, keep=1.0, window=2, consensus=0.95, wave=2)
    events = replay_events(policy, question, lambda ids: "".join("xyzuv"[number] for number in ids))
    report = events[-1].report  # type: ignore[union-attr]
    # One path agrees with itself: the search is over after the warm-up of one.
    assert [event.kind for event in events] == ["wave", "tokens", "tokens", "tokens", "vote", "done"]
    assert [event.text for event in events[1:4]] == ["x", "y", "z"]  # type: ignore[union-attr]
    assert [event.entropies for event in events[1:4]] == [(1.0,), (2.0,), (3.0,)]  # type: ignore[union-attr]
    assert (report.question, report.answer, report.closed_by) == ("why?", "a", "consensus")
    pruning = DeepConfOnline(warm_up=1, keep=1.0, window=2, consensus=1.0, wave=2)
    found = (path(None, 2), *found[1:])
    events = replay_events(pruning, replace(question, paths=found), lambda ids: "x" * len(ids))
    pruned = [event for event in events if isinstance(event, PruneEvent)]
    # The second path's first whole window is below the warm-up's, which is 0.
    assert [(event.path, event.num_tokens) for event in pruned] == [(1, 2)]
    assert events[-1].report.paths[1].text == "xx"  # type: ignore[union-attr]
    assert events[-1].report.num_tokens == 2 + 2 + 4  # type: ignore[union-attr]


class Letters:
    """A tokenizer of one token a character."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) for letter in text]


def test_a_task_prompt_is_one_token_longer_than_whole_blocks() -> None:
    for question in ("What is 3 * 6?", "What is 31 * 62?", "x" * 50):
        ids = prompt_ids(SearchConfig(task="products"), question, Letters())
        assert len(ids) % BLOCK_TOKENS == 1
        assert ids[0] == 1
        text = "".join(map(chr, ids[1:]))
        assert text.lstrip("\n") == find_task("products").prompt(question)
        assert text.endswith(f"Question: {question}\nAnswer:")


def test_a_free_question_is_sent_as_it_is() -> None:
    text = "".join(map(chr, prompt_ids(SearchConfig(), "  Why? ", Letters())[1:]))
    assert text.startswith("Why?\n")
    for blank in ("", " \n\t"):
        with pytest.raises(InputError, match="the question is empty"):
            prompt_ids(SearchConfig(), blank, Letters())


def test_a_task_settles_what_the_settings_leave_open() -> None:
    settled = settle(SearchConfig(task="gcd"))
    assert (settled.stop, settled.answer_kind) == (("\n",), "number")
    assert settle(SearchConfig(task="gcd", stop=("END",), answer_kind="text")).stop == ("END",)
    with pytest.raises(NotFoundError, match=r"no task 'zebra'; there are chain_sum"):
        settle(SearchConfig(task="zebra"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_splits_share_no_question_and_scorers_know_the_answer(task: object) -> None:
    pytest.importorskip("reasoning_gym")
    calibration = task.questions("calibration", 20)  # type: ignore[attr-defined]
    held_out = task.questions("held_out", 20)  # type: ignore[attr-defined]
    texts = {question.text for question in calibration}
    assert len(texts) == 20
    assert not texts & {question.text for question in held_out}
    assert task.questions("held_out", 5) != []  # type: ignore[attr-defined]
    for question in held_out[:5]:
        # Among a few thousand numbers exactly one is right.
        right = [value for value in range(-200, 10_000) if question.is_right(Answer(str(value), str(value)))]
        assert len(right) <= 1
        assert not question.is_right(Answer("nonsense", "nonsense"))


def test_the_example_answers_are_right() -> None:
    pytest.importorskip("reasoning_gym")
    products = find_task("products").questions("held_out", 10)
    for question in products:
        left, right = (int(piece) for piece in question.text.removeprefix("What is ").rstrip("?").split(" * "))
        assert question.is_right(Answer(str(left * right), str(left * right)))
        assert not question.is_right(Answer(str(left * right + 1), str(left * right + 1)))


@pytest.mark.parametrize(
    ("entropies", "length"),
    [
        ([1.0, 1.0, 1.0], 0),
        # The middle half of eight is tokens 2 to 5; the surest of them is token 4, so five are kept.
        ([0.0, 0.0, 2.0, 1.0, 0.5, 1.0, 0.0, 0.0], 5),
        # Of equals the last: tokens 3 and 4 are equal.
        ([9.0, 9.0, 2.0, 0.5, 0.5, 1.0, 0.0, 0.0], 5),
    ],
)
def test_where_a_path_is_forked(entropies: list[float], length: int) -> None:
    assert fork_length(np.array(entropies, dtype=np.float32)) == length


def test_survivors_are_the_calmest_that_ended() -> None:
    def lane(index: int, entropy: float, reason: FinishReason = FinishReason.STOP, answer: str | None = "a") -> Lane:
        made = path(answer, 4, entropy=entropy)
        return Lane(index, signals=made.signals, finish_reason=reason, answer=made.answer)

    lanes = [lane(0, 2.0), lane(1, 1.0), lane(2, 0.1, FinishReason.PRUNED), lane(3, 0.2, answer=None), lane(4, 1.5)]
    assert [found.index for found in survivors(lanes, 2)] == [1, 4]


def report_of(lanes: list[Lane]) -> object:
    return build_report("why?", "full", vote(lanes), lanes, max_paths=4, closed_by=None, seconds=1.0)


def test_reports_say_what_went_wrong() -> None:
    lanes = ended("abba")
    report = report_of(lanes)
    assert report.tied == ("a", "b")  # type: ignore[attr-defined]
    assert "2 answers are tied" in report.note  # type: ignore[attr-defined]
    assert "no path gave an answer" in report_of(ended("--")).note  # type: ignore[attr-defined]
    for lane in lanes:
        lane.finish_reason, lane.answer = FinishReason.PRUNED, None
    assert "all paths were pruned" in report_of(lanes).note  # type: ignore[attr-defined]
    assert "best_response" not in report.cognitive_report  # type: ignore[attr-defined]
    # NaN signals become null, so that every report is valid JSON.
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["paths"][0]["mean_entropy"] is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs" / "search").glob("*.toml")), ids=lambda file: file.name
)
def test_packaged_settings_are_read(file: Path) -> None:
    from sparkray.config.base import load_settings

    assert load_settings(SearchConfig, [file], [], {}).num_paths > 1
