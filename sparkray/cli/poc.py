"""`sparkray poc`: generate, validate, measure, plan and check proofs of compute on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkray.errors import EXIT_FAILED

app = typer.Typer(no_args_is_help=True, help="Proof of compute: generate, validate, measure, plan, check.")

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]


@app.callback()
def _root() -> None: ...


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Recorded values of the original, JSON, any subset of sections.")],
    json_output: JsonFlag = False,
) -> None:
    """Compare this implementation with recorded values; exits 1 on any mismatch."""
    from sparkray.poc.golden import check_file
    from sparkray.telemetry.console import print_json, stderr_console

    console = stderr_console()
    reports = []
    for report in check_file(file):
        reports.append(report)
        line = f"{report.name}: {report.status}, {report.num_matched} values"
        if report.num_mismatched:
            line += f" matched, {report.num_mismatched} differ"
        line += f", worst error {report.worst_error:.2e}"
        if report.worst_where:
            line += f" at {report.worst_where}"
        lines = [
            line,
            *(f"  differs: {text}" for text in report.findings),
            *(f"  note: {text}" for text in report.notes),
        ]
        if json_output:
            console.print("\n".join(lines), markup=False, soft_wrap=True)
        else:
            typer.echo("\n".join(lines))
    num_mismatched = sum(report.num_mismatched for report in reports)
    unknown = [report.name for report in reports if not report.known]
    compared = any(report.num_matched for report in reports)
    passed = not num_mismatched and compared
    summary = "every value matched" if passed else f"{num_mismatched} values differ" if compared else "nothing compared"
    if unknown:
        summary += f"; NOT checked, unknown: {', '.join(unknown)}"
    if json_output:
        print_json(
            {
                "ok": passed,
                "num_matched": sum(report.num_matched for report in reports),
                "num_mismatched": num_mismatched,
                "unknown_sections": unknown,
                "sections": {report.name: report.to_json() for report in reports},
            }
        )
    else:
        typer.echo(summary)
    if not passed:
        raise typer.Exit(EXIT_FAILED)
