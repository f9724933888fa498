"""`sparkray doctor`: what is right and wrong with this machine, a line each, with its mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from sparkray.cli.options import JsonFlag
from sparkray.errors import EXIT_UNAVAILABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparkray.hardware import Finding, MachineReading


def doctor(json: JsonFlag = False) -> None:
    """Check versions, cores, memory, GPU, ports, disk and Ray's settings; exits 3 if there is a problem."""
    from dataclasses import asdict

    from sparkray.hardware import Level, diagnose, identify_devices
    from sparkray.telemetry.console import print_json

    reading = read_this_machine()
    findings = diagnose(reading)
    num_problems = sum(finding.level is Level.PROBLEM for finding in findings)
    num_warnings = sum(finding.level is Level.WARNING for finding in findings)
    if json:
        devices = [{"kind": type(device).__name__, **asdict(device)} for device in identify_devices(reading)]
        print_json(
            {
                "ok": num_problems == 0,
                "num_problems": num_problems,
                "num_warnings": num_warnings,
                "findings": [asdict(finding) for finding in findings],
                "devices": devices,
            }
        )
    else:
        show(findings)
        typer.echo(f"{num_problems} problems, {num_warnings} warnings", err=True)
    if num_problems:
        raise typer.Exit(EXIT_UNAVAILABLE)


def read_this_machine() -> MachineReading:
    """This machine with the ports, folders and model that sparkray's defaults use."""
    import tempfile
    from pathlib import Path

    from sparkray.config import ClusterConfig, ServeConfig
    from sparkray.errors import MissingExtraError
    from sparkray.hardware.probes import read_machine
    from sparkray.hardware.reading import EmbeddedReading
    from sparkray.models import EMBEDDED, ready_path, resolve_model
    from sparkray.models.cache import cache_root
    from sparkray.models.hub import hub_cache, is_offline

    try:
        embedded = EmbeddedReading(installed=True, prepared=ready_path(resolve_model(EMBEDDED)) is not None)
    except MissingExtraError:
        embedded = EmbeddedReading(installed=False, prepared=False)
    ports = {
        ServeConfig().port: "HTTP of a served model",
        ClusterConfig().dashboard_port: "Ray's dashboard and jobs",
        6379: "control store of a cluster made by `ray up`",
    }
    folders = [cache_root(), hub_cache(), Path(tempfile.gettempdir())]
    return read_machine(ports=ports, folders=folders, embedded=embedded, hub_offline=is_offline())


def show(findings: Sequence[Finding]) -> None:
    """A table on a terminal; elsewhere one line a finding, `level<TAB>name<TAB>found`, its mend after `->`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        for finding in findings:
            mend = f" -> {finding.mend}" if finding.mend else ""
            typer.echo(f"{finding.level}\t{finding.name}\t{finding.found}{mend}")
        return
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.mend:
            found.append(f"\n-> {finding.mend}", style="bold")
        table.add_row(Text(finding.level, style=styles[finding.level]), Text(finding.name), found)
    console.print(table)
