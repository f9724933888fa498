"""`sparkray poc`: generate, validate, measure, plan and check proofs of compute here, and watch a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, DryRun, JsonFlag, Overrides, read_settings
from sparkray.errors import EXIT_FAILED, EXIT_REJECTED, InputError, NotFoundError

if TYPE_CHECKING:
    from sparkray.config.poc import PocConfig

app = typer.Typer(no_args_is_help=True, help="Proof of compute: generate, validate, measure, plan, check, watch.")

Preset = Annotated[str | None, typer.Option(help="Shape and weights: V1, V2, BIG or TINY.")]
BlockHash = Annotated[str | None, typer.Option(help="Block that seeds weights, inputs and target.")]
PublicKey = Annotated[str | None, typer.Option(help="Participant's key; seeds inputs and permutations.")]
RTarget = Annotated[float | None, typer.Option(help="A nonce is valid where its distance is below this.")]
Mode = Annotated[str | None, typer.Option(help="`compatible` with the network, or `hardened`.")]
Device = Annotated[str | None, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
BatchSize = Annotated[
    str | None,
    typer.Option(help="Nonces in a batch; empty: measured; `v1`, `v2`: by the network's formulas."),
]


@app.callback()
def _root() -> None: ...


@app.command()
def generate(
    count: Annotated[int, typer.Option(min=1, help="Nonces to compute.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Write the valid ones here, as the network's ProofBatch.")] = None,
    preset: Preset = None,
    block_hash: BlockHash = None,
    public_key: PublicKey = None,
    r_target: RTarget = None,
    mode: Mode = None,
    device: Device = None,
    batch_size: BatchSize = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    json_output: JsonFlag = False,
) -> None:
    """Compute nonces and keep the valid ones."""
    settings = _settings(
        config, overrides, preset, block_hash=block_hash, public_key=public_key, r_target=r_target, mode=mode,
        device=device, batch_size=batch_size,
    )  # fmt: skip
    if dry_run:
        _print({"count": count, "out": str(out) if out else None, **settings.model_dump()}, json_output)
        return
    from sparkray.poc import local
    from sparkray.telemetry.console import progress_bar

    with progress_bar() as bar:
        task = bar.add_task("nonces", total=count)
        done = local.generate(settings, count, lambda total: bar.update(task, completed=total))
    body = done.batch.to_wire()
    if done.digests is not None:
        body["digests"] = list(done.digests)
    if out is not None:
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(body), encoding="utf-8")
        partial.replace(out)
    _print(
        {
            "mode": settings.mode,
            "num_nonces": done.monitor.num_total,
            "num_valid": done.monitor.num_valid,
            "expected_valid_share": done.monitor.expected_share,
            "z_score": _finite(done.monitor.z_score),
            "alarm": done.monitor.alarm,
            "seconds": done.seconds,
            "nonces_per_minute": 60 * done.monitor.num_total / done.seconds,
            **({"out": str(out)} if out else {"proof": body}),
        },
        json_output,
    )


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A ProofBatch in JSON.")],
    noise_sd: Annotated[
        float | None, typer.Option(min=0.0, help="Noise between the sender's distances and ours; default 1.9e-5.")
    ] = None,
    max_nonces: Annotated[int | None, typer.Option(min=1, help="Compute at most this many of them.")] = None,
    stop_early: Annotated[bool, typer.Option(help="Stop as soon as the sequential test has decided.")] = False,
    preset: Preset = None,
    block_hash: BlockHash = None,
    r_target: RTarget = None,
    mode: Mode = None,
    device: Device = None,
    batch_size: BatchSize = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json_output: JsonFlag = False,
) -> None:
    """Compute a batch again and judge it; exits 4 where it is fraud."""
    from sparkray.poc.proofs import ProofBatch

    body = _read_json(file)
    batch = ProofBatch.from_wire(body)
    settings = _settings(
        config, overrides, preset, block_hash=block_hash or batch.block_hash, public_key=batch.public_key,
        r_target=r_target, mode=mode, device=device, batch_size=batch_size,
    )  # fmt: skip
    from sparkray.poc import local
    from sparkray.poc.validation import DEFAULT_NOISE_SD, NoiseBand
    from sparkray.poc.validation import validate as judge

    if settings.mode == "hardened":
        digests = body.get("digests")
        if not isinstance(digests, list) or len(digests) != len(batch):
            raise InputError(f"{file} has no digest for each of its {len(batch)} nonces.", param="digests")
        verdicts = local.verify_hardened(settings, batch, digests)
        wrong = [nonce for nonce, ok in zip(batch.nonces, verdicts, strict=True) if not ok]
        _print({"mode": "hardened", "num_checked": len(verdicts), "wrong_nonces": wrong}, json_output)
        fraud = bool(wrong)
    else:
        engine = local.make_engine(settings)
        judged = judge(
            batch.split(max_nonces)[0] if max_nonces and len(batch) else batch,
            engine.distances,
            r_target=settings.r_target,
            fraud_threshold=settings.fraud_threshold,
            band=NoiseBand(DEFAULT_NOISE_SD if noise_sd is None else noise_sd),
            block_hash=settings.block_hash,
            node_count=settings.node_count if settings.node_count > 1 else None,
            chunk_size=engine.batch_size if stop_early else None,
        )
        rejected = judged.screened.rejected
        _print(
            {
                "mode": "compatible",
                "num_received": len(batch),
                "num_computed": judged.num_computed,
                "n_invalid": judged.verdict.n_invalid,
                "probability_honest": judged.verdict.probability_honest,
                "fraud_detected": judged.verdict.fraud_detected,
                "outside_noise_band": list(judged.outside_band),
                "sequential_test": judged.decision.value,
                "rejected": {str(batch.nonces[index]): reason.value for index, reason in rejected.items()},
                "is_fraud": judged.is_fraud,
            },
            json_output,
        )
        fraud = judged.is_fraud
    if fraud:
        raise typer.Exit(EXIT_REJECTED)


@app.command()
def rate(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 10.0,
    preset: Preset = None,
    block_hash: BlockHash = None,
    public_key: PublicKey = None,
    r_target: RTarget = None,
    device: Device = None,
    batch_size: BatchSize = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure nonces a minute, and whether as many of them are valid as theory says; exits 1 on its alarm."""
    settings = _settings(
        config, overrides, preset, block_hash=block_hash or "rate", public_key=public_key or "rate",
        r_target=r_target, device=device, batch_size=batch_size,
    )  # fmt: skip
    from dataclasses import asdict

    from sparkray.poc import local

    measured = local.measure_rate(settings, seconds)
    _print({**asdict(measured), "z_score": _finite(measured.z_score)}, json_output)
    if measured.alarm:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    machine: Annotated[str, typer.Option(help="GB10, H100, H200, A100 or RTX 4090.")] = "GB10",
    r_target: RTarget = None,
    top: Annotated[int, typer.Option(min=1, help="Shapes of the search to list.")] = 5,
    measure: Annotated[bool, typer.Option(help="Try the cost model on this machine as well.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Size, start and rate of the presets on a machine, and the search for the big one."""
    from sparkray.config.poc import PRESETS, R_TARGET_DEFAULT
    from sparkray.poc.planner import MACHINES, predict, search

    known = {each.name: each for each in MACHINES}
    if machine not in known:
        raise InputError(f"machine {machine!r} was asked for, and {', '.join(known)} are known.", param="machine")
    target = R_TARGET_DEFAULT if r_target is None else r_target
    rows = [
        {"preset": name, **_row(predict(params, weights, known[machine], target))}
        for name, (params, weights) in PRESETS.items()
    ]
    rows += [{"preset": "", **_row(each)} for each in search(known[machine], r_target=target)[:top]]
    result: dict[str, Any] = {"machine": machine, "r_target": target, "rows": rows}
    if measure:
        from dataclasses import asdict

        from sparkray.poc.measure import check_cost_model, measure_machine

        here = measure_machine()
        result["this_machine"] = {**asdict(here), **check_cost_model(here)}
    if json_output:
        _print(result, json_output)
        return
    _print_table(rows)
    if measure:
        _print(result["this_machine"], json_output)


@app.command()
def watch(
    url: Annotated[str, typer.Option(help="The service of `serve_apps/poc.yaml`.")] = "http://127.0.0.1:8080",
    seconds: Annotated[float, typer.Option(min=0.2, help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option(help="Look once and end.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Follow a running service: a live table of its groups, or with --json one object a look.

    A token is taken from SPARKRAY_POC_TOKEN.
    """
    import time

    from sparkray.poc.live_table import LiveTable
    from sparkray.poc.service.client import read_status

    with LiveTable(quiet=json_output) as table:
        while True:
            status = read_status(url)
            if json_output or once:
                _print(status, json_output)
            elif "cursors" in status["progress"]:
                table.show(status["progress"])
            if once:
                return
            time.sleep(seconds)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Recorded values of the original, JSON, any subset of sections.")],
    json_output: JsonFlag = False,
) -> None:
    """Compare this implementation with recorded values; exits 1 on any mismatch."""
    from sparkray.poc.golden import check_file
    from sparkray.telemetry.console import stderr_console

    console = stderr_console()
    reports = []
    for report in check_file(file):
        reports.append(report)
        if json_output:
            console.print(report.summary(), markup=False, soft_wrap=True)
        else:
            typer.echo(report.summary())
    num_mismatched = sum(report.num_mismatched for report in reports)
    unknown = [report.name for report in reports if not report.known]
    compared = any(report.num_matched for report in reports)
    passed = not num_mismatched and compared
    if json_output:
        _print(
            {
                "ok": passed,
                "num_matched": sum(report.num_matched for report in reports),
                "num_mismatched": num_mismatched,
                "unknown_sections": unknown,
                "sections": {report.name: report.to_json() for report in reports},
            },
            json_output,
        )
    else:
        summary = "every value matched" if passed else f"{num_mismatched} values differ, {file} does not match"
        typer.echo(summary + (f"; NOT checked, unknown: {', '.join(unknown)}" if unknown else ""))
    if not passed:
        raise typer.Exit(EXIT_FAILED)


def _settings(
    files: list[Path] | None, overrides: list[str] | None, preset_name: str | None, **flags: Any
) -> PocConfig:
    from sparkray.config.poc import PocConfig, preset

    if preset_name is not None:
        params, weights = preset(preset_name)
        flags |= {"params": params.model_dump(), "weights": weights.model_dump()}
    return read_settings(PocConfig, files, overrides, flags)


def _row(prediction: Any) -> dict[str, Any]:
    params = prediction.params
    return {
        "dim": params.dim, "n_layers": params.n_layers, "ffn_hidden": params.ffn_hidden, "seq_len": params.seq_len,
        "weights": prediction.weights.label, "size_gb": prediction.nominal_gb, "distinct_gb": prediction.distinct_gb,
        "needed_gib": prediction.needed_gib, "fits": prediction.fits, "start_seconds": prediction.start_seconds,
        "raw_per_hour": prediction.raw_per_hour, "valid_per_hour": prediction.valid_per_hour,
    }  # fmt: skip


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def _print(result: dict[str, Any], json_output: bool) -> None:
    from sparkray.telemetry.console import print_json

    if json_output:
        print_json(result)
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")


def _finite(value: float) -> float | None:
    """JSON has no infinity: a share of valid nonces that theory rules out has no z-score."""
    return value if abs(value) < 1e300 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise NotFoundError(f"{path} does not exist, and a proof batch in JSON is expected.") from failure
    except (OSError, ValueError) as failure:
        raise InputError(f"{path} cannot be read as JSON: {failure}.") from failure
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}, and an object is expected.")
    return data
