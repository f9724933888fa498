"""`sparkray prune ...`: fewer experts in the same precision, whole or stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, DryRun, JsonFlag, Overrides

if TYPE_CHECKING:
    from sparkray.config.pruning import PruneConfig

app = typer.Typer(no_args_is_help=True, help="Cut experts of a mixture-of-experts model (REAP), and check the rest.")

Model = Annotated[Path, typer.Argument(help="Model directory: config.json and safetensors shards.", metavar="MODEL")]
Data = Annotated[
    str, typer.Option(help="Calibration set: .json, .jsonl, .txt, reasoning-gym[TASK]:N, or a hub's NAME(SPLIT):N.")
]
Work = Annotated[Path | None, typer.Option(help="Folder of partial sums and results; artifacts/MODEL/DATA by default.")]
GateSource = Annotated[str | None, typer.Option(help="`model` (the gates it uses) or `upstream` (softmax of logits).")]
Placement = Annotated[
    str | None, typer.Option(help="`auto`, `resident`, `streaming` (one layer in memory) or `layers` (over the nodes).")
]
OnRay = Annotated[bool, typer.Option("--ray/--no-ray", help="Use the Ray cluster that runs here: one actor a node.")]
Dtype = Annotated[str | None, typer.Option(help="`auto`, `float32`, `bfloat16` or `float16`.")]
Device = Annotated[str | None, typer.Option(help="torch device of the forward.")]
Criterion = Annotated[str | None, typer.Option(help="Score of an expert: reap, reap_l2, frequency, ean_mean, ...")]
Ratio = Annotated[float | None, typer.Option(help="Share of the experts to cut.")]
NumExperts = Annotated[int | None, typer.Option(help="Experts of a layer to keep.")]
TargetGb = Annotated[float | None, typer.Option(help="Size of the checkpoint to reach, in GB of 1e9 bytes.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the draw, and part of the directory's name.")]
Protect = Annotated[str | None, typer.Option(help="`none`, `super` or `outliers`: experts that are never cut.")]
MultipleOf = Annotated[int | None, typer.Option(help="Keep a multiple of this (expert parallelism).")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest sequence that is watched.")]
LongText = Annotated[str | None, typer.Option(help="Longer texts: `refuse`, `truncate` or `split`.")]
NumSamples = Annotated[int | None, typer.Option(help="Rows drawn from the calibration set.")]
MaxPerplexityRatio = Annotated[float | None, typer.Option(help="Fail above this: perplexity after over before.")]
MaxTokenKl = Annotated[float | None, typer.Option(help="Fail above this: mean KL a token, in nats.")]
EngineFlag = Annotated[
    str | None, typer.Option(help="Compare by `transformers`, or `vllm`'s prompt log-probabilities.")
]
MinTop1Agreement = Annotated[float | None, typer.Option(help="Fail below this: share of equal best tokens.")]


@app.command()
def experts(
    model: Model,
    data: Data,
    ratio: Ratio = None,
    num_experts: NumExperts = None,
    target_gb: TargetGb = None,
    criterion: Criterion = None,
    seed: Seed = None,
    protect: Protect = None,
    multiple_of: MultipleOf = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the pruned checkpoint.")] = None,
    work: Work = None,
    gate_source: GateSource = None,
    placement: Placement = None,
    dtype: Dtype = None,
    device: Device = None,
    max_tokens: MaxTokens = None,
    long_text: LongText = None,
    num_samples: NumSamples = None,
    max_perplexity_ratio: MaxPerplexityRatio = None,
    max_token_kl: MaxTokenKl = None,
    min_top1_agreement: MinTop1Agreement = None,
    engine: EngineFlag = None,
    check: Annotated[bool, typer.Option(help="Compare both models at the end.")] = True,
    ask: Annotated[
        Path | None, typer.Option(help="Prompts: serve the pruned model in the end and print its answers.")
    ] = None,
    serve: Annotated[
        list[str] | None, typer.Option("--serve", help="With --ask: a server's setting, as engine.max_num_seqs=8.")
    ] = None,
    on_ray: OnRay = False,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    json: JsonFlag = False,
) -> None:
    """Observe, plan, rewrite and check, in one go; a killed run goes on where it was."""
    settings = _settings(
        config,
        overrides,
        calibration={
            "max_sequence_tokens": max_tokens,
            "long_text": long_text,
            "num_samples": num_samples,
            "seed": seed,
        },
        observe={"gate_source": gate_source, "placement": placement, "dtype": dtype, "device": device},
        plan=_plan_flags(ratio, num_experts, target_gb, criterion, seed, protect, multiple_of),
        check={
            "max_perplexity_ratio": max_perplexity_ratio,
            "max_token_kl": max_token_kl,
            "min_top1_agreement": min_top1_agreement,
            "engine": engine,
            "dtype": dtype,
            "device": device,
        },
    )
    from sparkray.cli.prune_where import run_place
    from sparkray.pruning.pipeline import prune_experts

    with run_place(settings.actors, on_ray=on_ray) as (run_observe, run_shards):
        report = prune_experts(
            model,
            data,
            settings,
            work=work or _default_work(model, data),
            out=out,
            bar=_progress,
            check=check,
            dry_run=dry_run,
            run_observe=run_observe,
            run_shards=run_shards,
        )
    if ask is None or dry_run:
        _print(report, json)
        return
    from sparkray.cli.prune_ask import ask_served

    pruned = Path(report["directory"])
    answers = pruned.with_name(f"{pruned.name}.answers.json")
    _print(report | {"answers": ask_served(pruned, ask, answers, serve=serve or (), quiet=json)}, json)


@app.command()
def saliency(
    model: Model,
    inputs: Annotated[Path, typer.Option(help="JSON with input_ids and attention_mask, [batches, rows, tokens].")],
    gate_source: GateSource = None,
    placement: Placement = None,
    dtype: Dtype = None,
    device: Device = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Every statistic of every expert over ready-made token ids."""
    flags = {"gate_source": gate_source, "placement": placement, "dtype": dtype, "device": device}
    settings = _settings(config, overrides, observe=flags)
    from sparkray.pruning.saliency import saliency_report
    from sparkray.telemetry.console import print_json

    with _progress("observe") as advance:
        report = saliency_report(model, inputs, settings.observe, advance)
    if json:
        print_json(report)
        return
    for layer, fields in report["layers"].items():
        typer.echo(f"layer {layer}: {fields['total_tokens']} tokens")
        for expert, (count, score) in enumerate(zip(fields["expert_frequency"], fields["reap"], strict=True)):
            typer.echo(f"  expert {expert:4d}  tokens {count:8.0f}  reap {score:.6g}")


@app.command()
def observe(
    model: Model,
    data: Data,
    work: Work = None,
    gate_source: GateSource = None,
    placement: Placement = None,
    dtype: Dtype = None,
    device: Device = None,
    max_tokens: MaxTokens = None,
    long_text: LongText = None,
    num_samples: NumSamples = None,
    on_ray: OnRay = False,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Run the calibration set through the model and keep the sums; finished shards are not run again."""
    flags = {"max_sequence_tokens": max_tokens, "long_text": long_text, "num_samples": num_samples}
    watch = {"gate_source": gate_source, "placement": placement, "dtype": dtype, "device": device}
    settings = _settings(config, overrides, calibration=flags, observe=watch)
    from sparkray.cli.prune_where import run_place
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.pipeline import load_data, observe_stage

    checkpoint = Checkpoint(model)
    rows = load_data(checkpoint, data, settings.calibration)
    folder = work or _default_work(model, data)
    with run_place(settings.actors, on_ray=on_ray) as (run_observe, _):
        parts = observe_stage(checkpoint, rows, settings.observe, folder, _progress, run_observe)
    _print({"work": str(folder), "num_shards": len(parts), "num_tokens": rows.num_tokens}, json)


@app.command()
def plan(
    model: Model,
    data: Data,
    ratio: Ratio = None,
    num_experts: NumExperts = None,
    target_gb: TargetGb = None,
    criterion: Criterion = None,
    seed: Seed = None,
    protect: Protect = None,
    multiple_of: MultipleOf = None,
    out: Annotated[Path | None, typer.Option(help="Where the plan is written; WORK/reap_plan.json by default.")] = None,
    work: Work = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Decide which experts are cut, from sums that `observe` kept (or takes now)."""
    flags = _plan_flags(ratio, num_experts, target_gb, criterion, seed, protect, multiple_of)
    settings = _settings(config, overrides, calibration={"seed": seed}, plan=flags)
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.pipeline import check_request, load_data, observe_stage, plan_stage
    from sparkray.pruning.plan import PLAN_NAME, plan_summary

    checkpoint = Checkpoint(model)
    check_request(checkpoint, settings.plan)
    rows = load_data(checkpoint, data, settings.calibration)
    folder = work or _default_work(model, data)
    parts = observe_stage(checkpoint, rows, settings.observe, folder, _progress)
    made = plan_stage(checkpoint, parts, rows, settings)
    path = out or folder / PLAN_NAME
    made.write(path)
    _print({"plan": str(path)} | plan_summary(made), json)


@app.command()
def rewrite(
    model: Model,
    plan: Annotated[Path, typer.Option(help="A plan that `sparkray prune plan` made for this model.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the pruned checkpoint; beside the plan by default.")
    ] = None,
    on_ray: OnRay = False,
    dry_run: DryRun = False,
    json: JsonFlag = False,
) -> None:
    """Write the checkpoint that a plan describes, byte for byte in the precision it has."""
    from sparkray.cli.prune_where import run_place
    from sparkray.config.pruning import ActorConfig
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.plan import read_plan
    from sparkray.pruning.rewrite import rewrite as write

    made = read_plan(plan)
    target = out or plan.parent / made.directory_name
    with run_place(ActorConfig(), on_ray=on_ray) as (_, run_shards), _progress("rewrite") as advance:
        summary = write(Checkpoint(model), made, target, dry_run=dry_run, run=run_shards, progress=advance)
    _print(
        {
            "directory": str(summary.directory),
            "num_bytes": summary.num_bytes,
            "num_bytes_before": summary.num_bytes_before,
            "num_shards": summary.num_shards,
            "num_reused": summary.num_reused,
            "dry_run": dry_run,
        },
        json,
    )


@app.command()
def requantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the MXFP4 checkpoint.")],
    json: JsonFlag = False,
) -> None:
    """Write a gpt-oss checkpoint whose experts are floating point as MXFP4 again."""
    from sparkray.pruning.requantise import requantise

    with _progress("requantize") as advance:
        num_bytes = requantise(model, out, advance)
    _print({"directory": str(out), "num_bytes": num_bytes}, json)


@app.command()
def validate(
    model: Model,
    pruned: Annotated[Path, typer.Argument(help="The pruned checkpoint.", metavar="PRUNED")],
    data: Data,
    max_perplexity_ratio: MaxPerplexityRatio = None,
    max_token_kl: MaxTokenKl = None,
    min_top1_agreement: MinTop1Agreement = None,
    engine: EngineFlag = None,
    dtype: Dtype = None,
    device: Device = None,
    max_tokens: MaxTokens = None,
    long_text: LongText = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Compare a pruned checkpoint with its source; a broken bound makes the exit code 1."""
    flags = {
        "max_perplexity_ratio": max_perplexity_ratio,
        "max_token_kl": max_token_kl,
        "min_top1_agreement": min_top1_agreement,
        "engine": engine,
        "dtype": dtype,
        "device": device,
    }
    settings = _settings(
        config, overrides, calibration={"max_sequence_tokens": max_tokens, "long_text": long_text}, check=flags
    )
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.pipeline import load_data, validate_stage, write_report
    from sparkray.pruning.plan import PLAN_NAME, read_plan
    from sparkray.pruning.validate import broken_bounds, require_bounds

    before = Checkpoint(model)
    rows = load_data(before, data, settings.calibration)
    comparison = validate_stage(before, pruned, rows, settings.check, _progress)
    report: dict[str, Any] = {
        "check": comparison.to_json(),
        "broken_bounds": broken_bounds(comparison, settings.check),
    }
    if (pruned / PLAN_NAME).is_file():
        report = write_report(pruned, read_plan(pruned), comparison, settings.check)
    _print(report, json)
    require_bounds(comparison, settings.check)


@app.command()
def example(
    out: Annotated[Path, typer.Argument(help="Directory of the new checkpoint.", metavar="OUT")],
    num_experts: Annotated[int, typer.Option("--experts", min=3, max=64, help="Experts of every layer.")] = 4,
    json: JsonFlag = False,
) -> None:
    """Make a mixture of experts of the embedded model, to try pruning on without a download."""
    from sparkray.models import EMBEDDED, prepare_model
    from sparkray.pruning.upcycle import upcycle

    num_bytes = upcycle(Path(prepare_model(EMBEDDED)), out, num_experts=num_experts)
    _print({"directory": str(out), "num_experts": num_experts, "num_bytes": num_bytes}, json)


@app.command()
def size(
    model: Annotated[Path, typer.Argument(help="Model directory, or a config.json alone.", metavar="MODEL")],
    num_experts: Annotated[
        list[int] | None, typer.Option("--experts", help="Experts of a layer; may be repeated.")
    ] = None,
    target_gb: TargetGb = None,
    json: JsonFlag = False,
) -> None:
    """Size of the checkpoint for a number of experts, from its headers or from config.json alone."""
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.header_only import size_from_config
    from sparkray.pruning.layout import read_layout
    from sparkray.pruning.sizes import checkpoint_size

    if model.is_dir() and any(model.glob("*.safetensors")):
        checkpoint = Checkpoint(model)
        found = checkpoint_size(checkpoint, read_layout(checkpoint))
    else:
        found = size_from_config(model)
    counts = num_experts or [found.num_experts]
    report: dict[str, Any] = {
        "num_experts": found.num_experts,
        "fixed_bytes": found.fixed_bytes,
        "per_expert_bytes": found.per_expert_bytes,
        "gb": {str(count): found.bytes_with(count) / 1e9 for count in counts},
    }
    if target_gb is not None:
        report["experts_within_target"] = found.experts_within(target_gb * 1e9)
    _print(report, json)


def _plan_flags(
    ratio: float | None,
    num_experts: int | None,
    target_gb: float | None,
    criterion: str | None,
    seed: int | None,
    protect: str | None,
    multiple_of: int | None,
) -> dict[str, Any]:
    flags: dict[str, Any] = {"criterion": criterion, "seed": seed, "protect": protect, "multiple_of": multiple_of}
    sizes = {"ratio": ratio, "num_experts": num_experts, "target_gb": target_gb}
    flags = {key: value for key, value in flags.items() if value is not None}
    # A size on the command line replaces the one of a settings file, whichever it is.
    return flags | sizes if any(value is not None for value in sizes.values()) else flags


def _settings(config: list[Path] | None, overrides: list[str] | None, **parts: Mapping[str, Any]) -> PruneConfig:
    """Settings of a prune: files, then flags that were given, then `--set`."""
    from sparkray.config.base import load_settings
    from sparkray.config.pruning import PruneConfig

    given = {
        name: {key: value for key, value in flags.items() if value is not None or name == "plan"}
        for name, flags in parts.items()
    }
    return load_settings(PruneConfig, config or (), overrides or (), given)


def _default_work(model: Path, data: str) -> Path:
    from sparkray.pruning.pipeline import default_work

    return default_work(model, data)


def _print(report: Mapping[str, Any], as_json: bool) -> None:
    from sparkray.telemetry.console import print_json

    if as_json:
        print_json(report)
        return
    for line in _lines(report, ""):
        typer.echo(line)


def _lines(report: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in report.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, float):
            yield f"{indent}{key}: {value:.6g}"
        else:
            yield f"{indent}{key}: {value}"


@contextmanager
def _progress(description: str) -> Iterator[Callable[[int, int], None]]:
    from sparkray.telemetry.console import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
