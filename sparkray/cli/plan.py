"""`sparkray plan`: does a training run fit, what fits instead, and about how long a step is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sparkray.cli.options import JsonFlag

if TYPE_CHECKING:
    from sparkray.config.grpo import MethodName
    from sparkray.grpo.planner import Layout


def plan(
    model: Annotated[str, typer.Option(help="A size (7B, 14B, 32B, 72B), a model directory, or a hub id.")],
    method: Annotated[str | None, typer.Option(help="full, lora or qlora; all of them by default.")] = None,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="DGX Sparks.")] = 1,
    layout: Annotated[str | None, typer.Option(help="`together` or `apart` (the engine on a node of its own).")] = None,
    engine_bits: Annotated[int | None, typer.Option(help="Bits of a weight in the engine: 16, 8 or 4.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 32,
    generations: Annotated[int, typer.Option(min=2, help="Completions of a prompt.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 256,
    completion_tokens: Annotated[int, typer.Option(min=1)] = 512,
    json: JsonFlag = False,
) -> None:
    """Say whether a training run fits on so many DGX Sparks, and what does if it does not.

    Exits with 3 where the run that was asked for does not fit.
    """
    from sparkray.errors import EXIT_UNAVAILABLE
    from sparkray.grpo.planner import Workload, alternatives, find_shape, plan_run, table
    from sparkray.telemetry.console import print_json

    _one_of("method", method, ("full", "lora", "qlora"))
    _one_of("layout", layout, ("together", "apart"))
    _one_of("engine-bits", engine_bits, (16, 8, 4))
    shape = find_shape(model)
    workload = Workload(prompts, generations, prompt_tokens, completion_tokens)
    methods: list[MethodName] = [method] if method else ["full", "lora", "qlora"]  # type: ignore[list-item]
    layouts: list[Layout] = [layout] if layout else ["together", *(["apart"] if nodes > 1 else [])]  # type: ignore[list-item]
    asked = [
        plan_run(
            shape,
            method=one,
            num_nodes=nodes,
            layout=way,
            engine_bits=engine_bits or (4 if one == "qlora" else 16),
            workload=workload,
        )
        for one in methods
        for way in layouts
    ]
    fits = any(one.fits for one in asked)
    others = [] if fits else alternatives(shape, max_nodes=max(2, nodes), workload=workload)
    if json:
        print_json(
            {
                "model": shape.name,
                "num_params": shape.num_params,
                "num_nodes": nodes,
                "fits": fits,
                "plans": [one.to_dict() for one in asked],
                "alternatives": [one.to_dict() for one in others],
            }
        )
    else:
        for line in table(shape, asked):
            typer.echo(line)
        if not fits:
            typer.echo("What does fit:" if others else f"Nothing fits on up to {max(2, nodes)} nodes.")
            for line in table(shape, others)[1:] if others else []:
                typer.echo(line)
    if not fits:
        raise typer.Exit(EXIT_UNAVAILABLE)


def _one_of(name: str, given: object, accepted: tuple[object, ...]) -> None:
    from sparkray.errors import UsageError

    if given is not None and given not in accepted:
        raise UsageError(f"--{name} {given} was given; {', '.join(map(str, accepted))} are accepted.", param=name)
