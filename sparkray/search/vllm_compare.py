"""Two policies on one live engine, question by question in turn, so that both meet the same machine."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import Any

from sparkray.config.search import SearchConfig
from sparkray.config.serve import EngineConfig
from sparkray.errors import InternalError
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.models import resolve_model
from sparkray.search.answers import extract_answer
from sparkray.search.create import PACKAGED
from sparkray.search.events import DoneEvent
from sparkray.search.profile import load_profile, packaged_profile
from sparkray.search.report import SearchReport
from sparkray.search.tasks import TaskQuestion, find_task
from sparkray.search.vllm_parallel import live_search
from sparkray.search.vllm_session import own_engine, quick_dtype


@dataclass(frozen=True, slots=True)
class LiveRun:
    """One search: wall time, tokens, and whether the answer was right."""

    seconds: float
    num_tokens: int
    right: bool


def compare_live(
    num_questions: int, *, alpha: float = 0.05, num_paths: int = 32, model: str = "embedded"
) -> dict[str, Any]:
    """Search held-out questions by `full` and by `certified`; both start first in turn.

    Returns:
        `wall_ratio` and `token_ratio` of certified to full (medians over the questions), the ratios of the sums, and
        how many questions each had right.
    """
    source = resolve_model(model)
    profile = load_profile(packaged_profile(source.model_id))
    asked = [
        (name, question)
        for number in range(num_questions)
        for name in [profile.tasks[number % len(profile.tasks)]]
        for question in [find_task(name).questions("held_out", num_questions)[number // len(profile.tasks)]]
    ]
    runs: dict[str, list[LiveRun]] = {"full": [], "certified": []}
    limits = EngineConfig(dtype=quick_dtype(), max_num_seqs=num_paths, max_model_len=1024)
    with own_engine(model, limits) as engine, asyncio.Runner() as runner:
        for number, (name, question) in enumerate(asked):
            for policy in list(runs) if number % 2 else list(reversed(runs)):
                config = SearchConfig.model_validate(
                    {
                        "policy": policy,
                        "profile": PACKAGED if policy == "certified" else None,
                        "task": name,
                        "alpha": alpha,
                        "num_paths": num_paths,
                        "max_tokens": 64,
                        "temperature": profile.temperature,
                    }
                )
                report = runner.run(_search(engine, config, question, source.model_id))
                runs[policy].append(LiveRun(report.seconds, report.num_tokens, _is_right(report, config, question)))
    full, ours = runs["full"], runs["certified"]
    return {
        "num_questions": num_questions,
        "num_paths": num_paths,
        "alpha": alpha,
        "wall_ratio": statistics.median(run.seconds for run in ours) / statistics.median(run.seconds for run in full),
        "token_ratio": statistics.median(run.num_tokens for run in ours)
        / statistics.median(run.num_tokens for run in full),
        "wall_ratio_of_sums": sum(run.seconds for run in ours) / sum(run.seconds for run in full),
        "token_ratio_of_sums": sum(run.num_tokens for run in ours) / sum(run.num_tokens for run in full),
        "right": {policy: sum(run.right for run in found) for policy, found in runs.items()},
    }


async def _search(engine: WatchedEngine, config: SearchConfig, question: TaskQuestion, model_id: str) -> SearchReport:
    async for event in live_search(engine, config, question.text, model_id).events():
        if isinstance(event, DoneEvent):
            return event.report
    raise InternalError("a search ended without a report.")


def _is_right(report: SearchReport, config: SearchConfig, question: TaskQuestion) -> bool:
    kind = find_task(config.task or "").answer_kind
    answer = extract_answer(f"The answer is {report.answer}.", kind) if report.answer else None
    return answer is not None and question.is_right(answer)
