"""`sparkray search "question"`, and `sparkray search record|calibrate|eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sparkray.cli.options import ConfigFiles, JsonFlag, Overrides, read_settings

if TYPE_CHECKING:
    from sparkray.config.search import SearchConfig


class QuestionGroup(TyperGroup):
    """A group in which whatever is no verb is a question."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["ask", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=QuestionGroup,
    no_args_is_help=True,
    help='Many paths of thought for one question: sparkray search "What is 12 * 7?"',
)

Take = Callable[[dict[str, Any]], None]

_Recording = Annotated[Path, typer.Argument(help="Recorded paths, as `sparkray search record` writes them.")]


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    url: Annotated[
        str | None, typer.Option(help="Search on this server; by default on an engine of one's own.")
    ] = None,
    model: Annotated[str, typer.Option(help="`embedded`, a local directory or a hub id.")] = "embedded",
    policy: Annotated[str | None, typer.Option(help="certified, full, adaptive_consistency, esc, ...")] = None,
    paths: Annotated[int | None, typer.Option(help="Paths at most.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of one path at most.")] = None,
    task: Annotated[str | None, typer.Option(help="The packaged task the question belongs to.")] = None,
    profile: Annotated[str | None, typer.Option(help="Calibrated profile, for the policy certified.")] = None,
    alpha: Annotated[float | None, typer.Option(help="certified: P(prune a right path) at most.")] = None,
    iterative: Annotated[bool, typer.Option("--iterative", help="Rounds that fork the calmest paths.")] = False,
    save: Annotated[Path | None, typer.Option(help="Keep the events for a replay on the page.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Search for the answer to one question. (`ask` may be left out.)"""
    from sparkray.cli.search_lanes import SearchLanes
    from sparkray.config.search import SearchConfig
    from sparkray.errors import InputError, UnavailableError
    from sparkray.search.replay_file import write_replay
    from sparkray.telemetry.console import print_json, stderr_console

    given = {
        "policy": policy,
        "num_paths": paths,
        "max_tokens": max_tokens,
        "task": task,
        "profile": profile,
        "alpha": alpha,
    }
    settings = read_settings(SearchConfig, config, overrides, given)
    if not question.strip():
        # Before an engine starts, which takes a minute.
        raise InputError("the question is empty, and some text is expected.", param="question")
    kept: list[dict[str, Any]] = []
    console = stderr_console()
    console.quiet = json
    with SearchLanes(console) as lanes:

        def take(event: dict[str, Any]) -> None:
            kept.append(event)
            lanes.take(event)

        if url:
            _search_on_server(url, settings, question, take)
        else:
            _search_on_engine(model, settings, question, iterative, take)
    if not kept or kept[-1]["kind"] != "done":
        raise UnavailableError("the search ended without a report; the server may have gone away.")
    report = kept[-1]["report"]
    lanes.finish(report)
    if save is not None:
        write_replay(save, question, kept)
    if json:
        print_json(report)
    else:
        typer.echo(report["best_response"].strip())


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("search_paths.parquet"),
    model: Annotated[str | None, typer.Option(help="`embedded`, a local directory or a hub id.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Record paths with every per-token signal, once, to replay policies on. A recording that was cut off goes on."""
    from sparkray.config.search import RecordConfig
    from sparkray.telemetry.console import print_json
    from sparkray.telemetry.progress import RunProgress

    settings = read_settings(RecordConfig, config, overrides, {"model": model})
    from sparkray.search.vllm_dataset import record as record_dataset

    with RunProgress("chunks", quiet=json) as progress:
        made = record_dataset(settings, out, progress.update)
    num_tokens = sum(path.num_tokens for question in made.questions for path in question.paths)
    if json:
        print_json({"path": str(out), "num_questions": len(made.questions), "num_tokens": num_tokens})
        return
    typer.echo(f"{len(made.questions)} questions of {len(made.tasks)} tasks, {num_tokens} tokens, written to {out}")


@app.command()
def calibrate(
    recording: _Recording,
    out: Annotated[Path, typer.Option(help="File to write the profile to.")] = Path("search_profile.json"),
    tasks: Annotated[str | None, typer.Option(help="Tasks to calibrate on, with commas; by default all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the division of the questions.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Make a profile for the policy `certified` from the calibration questions of a recording."""
    from sparkray.search.calibration import CalibrationOptions
    from sparkray.search.calibration import calibrate as calibrate_profile
    from sparkray.search.recording import read_recording
    from sparkray.search.tasks import answer_kinds
    from sparkray.telemetry.console import print_json

    read = read_recording(recording, answer_kinds())
    chosen = read.select("calibration", tasks.split(",") if tasks else None)
    made = calibrate_profile(read.info, chosen, CalibrationOptions(seed=seed))
    made.save(out)
    levels = {f"{alpha:g}": level for alpha, level in made.prune_below.items()}
    if json:
        print_json({"path": str(out), "name": made.name, "num_questions": made.num_questions, "prune_below": levels})
        return
    typer.echo(f"{made.name}: {made.num_questions} questions, written to {out}")
    for alpha, level in levels.items():
        said = "too few questions to prune at all" if level is None else f"paths below {level:.2g} are pruned"
        typer.echo(f"alpha {alpha:>4}: {said}")


@app.command(name="eval")
def evaluate(
    recording: _Recording,
    profile: Annotated[Path | None, typer.Option(help="Profile; by default the packaged one of the model.")] = None,
    alpha: Annotated[float, typer.Option(help="P(prune a right path) at most.")] = 0.05,
    split: Annotated[str, typer.Option(help="held_out or calibration.")] = "held_out",
    orders: Annotated[int, typer.Option(min=1, help="Replays of each question, its paths in different orders.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="PNG of accuracy against tokens.")] = None,
    json: JsonFlag = False,
) -> None:
    """Replay every policy on held-out questions: right answers, tokens, paired bootstrap intervals."""
    from sparkray.search.plot import plot_accuracy
    from sparkray.search.profile import load_profile, packaged_profile
    from sparkray.search.recording import read_recording
    from sparkray.search.suite import compare_all
    from sparkray.search.table import comparison_table
    from sparkray.search.tasks import answer_kinds
    from sparkray.telemetry.console import print_json

    read = read_recording(recording, answer_kinds())
    calibrated = load_profile(profile or packaged_profile(read.info.model))
    compared = compare_all(read, calibrated, split=split, alpha=alpha, num_orders=orders)
    if plot is not None:
        title = f"{read.info.model}, {compared.num_questions} questions x {compared.num_paths} paths"
        plot_accuracy(compared.figures, plot, title)
    if json:
        print_json(compared.to_dict())
    else:
        typer.echo(comparison_table(compared))


@app.command()
def replay(
    recording: _Recording,
    out: Annotated[Path, typer.Option(help="File to write the events to, for the page.")],
    task: Annotated[str, typer.Option(help="Task of the question.")] = "products",
    index: Annotated[int, typer.Option(min=0, help="Its number among the held-out questions of the task.")] = 0,
    policy: Annotated[str, typer.Option(help="As of a search.")] = "deepconf_online",
    model: Annotated[str, typer.Option(help="Whose tokenizer turns tokens into text.")] = "embedded",
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Search among the recorded paths of one question, and keep what happens, for eyes."""
    from sparkray.cli.search_lanes import SearchLanes
    from sparkray.config.search import SearchConfig
    from sparkray.errors import NotFoundError
    from sparkray.search.create import create_policy, open_profile
    from sparkray.search.events import event_to_dict
    from sparkray.search.recording import read_recording
    from sparkray.search.replay_events import replay_events
    from sparkray.search.replay_file import write_replay
    from sparkray.search.tasks import answer_kinds
    from sparkray.search.tokens import decoder
    from sparkray.telemetry.console import print_json, stderr_console

    settings = read_settings(SearchConfig, config, overrides, {"policy": policy, "task": task})
    read = read_recording(recording, answer_kinds())
    found = [question for question in read.select("held_out", [task]) if question.index == index]
    if not found:
        raise NotFoundError(f"the recording has no held-out question {index} of the task {task!r}.", param="index")
    chosen = create_policy(settings, open_profile(settings, read.info.model))
    events = [event_to_dict(event) for event in replay_events(chosen, found[0], decoder(model))]
    report = events[-1]["report"]
    write_replay(out, report["question"], events)
    if json:
        print_json(report)
        return
    with SearchLanes(stderr_console()) as lanes:
        for event in events:
            lanes.take(event)
    lanes.finish(report)


def _search_on_server(url: str, settings: SearchConfig, question: str, take: Take) -> None:
    from sparkray.serving.client import ChatClient

    with ChatClient(url) as client:
        for event in client.search({**settings.model_dump(mode="json", exclude_unset=True), "question": question}):
            take(event)


def _search_on_engine(model: str, settings: SearchConfig, question: str, iterative: bool, take: Take) -> None:
    from sparkray.search.events import event_to_dict
    from sparkray.search.vllm_parallel import MetisIterativeSearch, MetisParallelSearch

    kind = MetisIterativeSearch if iterative else MetisParallelSearch
    with kind(settings, model=model) as search:
        search.follow(question, lambda event: take(event_to_dict(event)))
