"""`sparkray cluster`: check and launch the machines that a cluster.yaml names, and reach a cluster that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkray.errors import EXIT_FAILED, SparkrayError

app = typer.Typer(no_args_is_help=True, help="Check and launch the machines of a cluster.yaml; reach a cluster.")

ClusterFile = Annotated[Path, typer.Argument(help="The cluster file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds that one command on one node may take.")]


@app.command()
def launch(
    file: ClusterFile = Path("cluster.yaml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, run none.")] = False,
    timeout_seconds: Timeout = 300.0,
    json_output: Json = False,
) -> None:
    """Start Ray on every machine through ssh: the head, then the workers, with the commands of the file."""
    from sparkray.cluster.cluster_file import read_cluster_file
    from sparkray.cluster.launch import commands_for
    from sparkray.cluster.launch import launch as launch_nodes
    from sparkray.telemetry.console import print_json, stderr_console

    config = read_cluster_file(file)
    if dry_run:
        commands = commands_for(config)
        if json_output:
            shown = [
                {"node_ip": c.node_ip, "role": c.role, "purpose": c.purpose, "command": c.command} for c in commands
            ]
            print_json({"commands": shown})
        else:
            for command in commands:
                typer.echo(f"# {command.role} {command.node_ip}: {command.purpose}\n{command.command.rstrip()}\n")
        return
    console = stderr_console()
    num_commands = launch_nodes(config, timeout_seconds=timeout_seconds, report=console.print)
    num_nodes = 1 + len(config["provider"]["worker_ips"])
    if json_output:
        print_json({"num_nodes": num_nodes, "num_commands": num_commands})
    else:
        typer.echo(f"{num_nodes} nodes started. On the head: `. ~/.sparkray/node.env && ray status`.")


@app.command()
def check(
    file: ClusterFile = Path("cluster.yaml"),
    offline: Annotated[bool, typer.Option("--offline", help="Check the file alone, connect to no machine.")] = False,
    timeout_seconds: Timeout = 30.0,
    json_output: Json = False,
) -> None:
    """Check the file by Ray's rules and ours, then each machine: address, link, memory, GPU, versions, token."""
    from sparkray.cluster.cluster_file import read_cluster_file
    from sparkray.cluster.launch import nodes_of, run_on_node
    from sparkray.cluster.preflight import NodeFinding, judge_node, judge_together, parse_probe, probe_command
    from sparkray.telemetry.console import print_json

    config = read_cluster_file(file)
    findings = [NodeFinding("file", "ok", f"{file} is accepted by Ray and by sparkray")]
    probes: dict[str, dict[str, str]] = {}
    for node_ip, role in [] if offline else nodes_of(config):
        try:
            output = run_on_node(probe_command(node_ip, role), config["auth"], timeout_seconds=timeout_seconds)
        except SparkrayError as failure:
            findings.append(NodeFinding(node_ip, "problem", failure.message, failure.hint or ""))
            continue
        probes[node_ip] = parse_probe(output)
        findings += judge_node(node_ip, probes[node_ip])
    findings += judge_together(probes)
    num_problems = sum(finding.level == "problem" for finding in findings)
    if json_output:
        lines = [{"node": f.node_ip, "level": f.level, "found": f.found, "mend": f.mend} for f in findings]
        print_json({"num_problems": num_problems, "findings": lines})
    else:
        for finding in findings:
            typer.echo(
                f"{finding.level:8} {finding.node_ip:16} {finding.found}{'. ' + finding.mend if finding.mend else ''}"
            )
    if num_problems:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def env(
    name: Annotated[str | None, typer.Option("--name", help="The session; by default the one that runs.")] = None,
    json_output: Json = False,
) -> None:
    """Print what a shell needs for Ray's own commands: eval "$(sparkray cluster env)". The token stays in its file."""
    import shlex

    from sparkray.cluster.session import running_session
    from sparkray.telemetry.console import print_json

    variables = running_session(name).environment()
    if json_output:
        print_json(variables)
        return
    for key, value in variables.items():
        typer.echo(f"export {key}={shlex.quote(value)}")
