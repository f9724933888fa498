"""`sparkray handoff`: decode, find, ask, verify, plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, JsonFlag, Overrides, read_settings
from sparkray.errors import EXIT_FAILED, InputError, UsageError

if TYPE_CHECKING:
    from sparkray.config.handoff import DecodeConfig, PrefillConfig
    from sparkray.handoff.client import Peer
    from sparkray.handoff.vllm_prefill import PrefillEngine

app = typer.Typer(no_args_is_help=True, help="Prefill here, decode there: decode, find, ask, verify, plan.")

PeerAddress = Annotated[
    str,
    typer.Option("--peer", help="Decode peer, as mac.local:7070; a server, as http://mac:11434/v1; or mdns: find one."),
]
SecretFile = Annotated[Path | None, typer.Option(help="File with the secret that both sides share.")]
Model = Annotated[str | None, typer.Option(help="`embedded`, a directory, a GGUF file or a hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Codec = Annotated[str | None, typer.Option(help="raw, lossless, int8, k4v4, or auto: by measured rates.")]


@app.callback()
def _root() -> None: ...


@app.command()
def decode(
    listen: Annotated[str | None, typer.Option(help="Address to listen at, HOST:PORT; port 0 is any free one.")] = None,
    engine: Annotated[str | None, typer.Option(help="mlx or llamacpp.")] = None,
    model: Model = None,
    dtype: Dtype = None,
    kv_type: Annotated[str | None, typer.Option(help="llama.cpp's cache: f32, f16, bf16, q8_0 or q4_0.")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Longest sequence, prompt and answer.")] = None,
    secret_file: SecretFile = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without TLS.")] = None,
    announce: Annotated[bool, typer.Option("--announce", help="Be found on the local network (mDNS).")] = False,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json_output: JsonFlag = False,
) -> None:
    """Listen as a decode peer; runs on the Mac, or anywhere that decodes well."""
    from sparkray.config.handoff import DecodeConfig

    flags: dict[str, Any] = {
        "engine": engine, "model": model, "dtype": dtype, "kv_type": kv_type, "context_tokens": context_tokens,
        "secret_file": str(secret_file) if secret_file else None, "insecure": insecure,
    }  # fmt: skip
    if listen is not None:
        from sparkray.handoff.tcp import split_address

        flags["host"], flags["port"] = split_address(listen)
    settings = read_settings(DecodeConfig, config, overrides, flags)
    if settings.secret_file is None:
        settings = settings.model_copy(update={"secret_file": str(_own_secret())})
    from sparkray.handoff.agent import DecodeAgent
    from sparkray.handoff.engine import create_engine

    agent = DecodeAgent(settings, create_engine)
    told: AbstractContextManager[None] = nullcontext()
    if announce:
        from sparkray.handoff.discovery import announced

        told = announced(agent.address, agent.identity)
    _print(
        {
            "address": agent.address,
            "engine": agent.identity.engine,
            "weights": agent.identity.weights,
            "fingerprint": agent.identity.digest,
            "secret_file": settings.secret_file,
        },
        json_output,
    )
    try:
        with told:
            agent.serve()
    finally:
        agent.stop()


@app.command()
def find(
    seconds: Annotated[float, typer.Option(min=0.1, max=60, help="How long to listen for answers.")] = 3.0,
    json_output: JsonFlag = False,
) -> None:
    """List decode peers of the local network that were started with `--announce`."""
    from dataclasses import asdict

    from sparkray.handoff.discovery import find_peers

    found = [asdict(peer) for peer in find_peers(seconds)]
    if json_output:
        _print({"peers": found}, json_output)
        return
    for peer in found:
        typer.echo("  ".join(str(value) for value in peer.values()))


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    peer: PeerAddress,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")] = False,
    model: Model = None,
    dtype: Dtype = None,
    codec: Codec = None,
    secret_file: SecretFile = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json_output: JsonFlag = False,
) -> None:
    """Read a prompt here with vLLM and have it answered by a decode peer, or send it as text to a server's URL."""
    if peer.startswith(("http://", "https://")):
        import asyncio

        _print(asyncio.run(_ask_plainly(peer, prompt, model or "default", max_tokens)), json_output)
        return
    settings = _prefill_settings(config, overrides, model=model, dtype=dtype, codec=codec)
    if peer == "mdns":
        from sparkray.handoff.discovery import find_one

        peer = find_one().address
    target = _peer(peer, secret_file, settings)
    from sparkray.handoff.text import TextCodec

    text = TextCodec.load(settings.model)
    ids = text.encode_text(prompt) if raw else text.encode_chat([{"role": "user", "content": prompt}])

    async def run(prefiller: PrefillEngine) -> dict[str, Any]:
        from sparkray.handoff.handing import Ask, Told, answer, collect, pair

        await pair(target, prefiller)
        told, shown = Told(), text.stream()

        def show(token: int) -> None:
            if not json_output:
                typer.echo(shown.feed(token), nl=False)

        asked = Ask(tuple(ids), max_tokens, stop_ids=text.stop_ids)
        await collect(answer(target, asked, prefiller, told), told, show)
        assert told.done is not None
        if not json_output:
            typer.echo("")
        done = told.done
        return {
            "text": text.decode(told.tokens), "num_tokens": len(told.tokens), "handoff": done.verdict,
            "reason": done.reason, "rows_received": done.rows_received, "kv_bytes": done.kv_bytes, "times": done.times,
        }  # fmt: skip

    result = _with_prefill(settings, run)
    if json_output:
        _print(result, json_output)
    else:
        typer.echo(f"[{result['handoff']}: {result['rows_received']} rows, {result['kv_bytes']} bytes]", err=True)


@app.command()
def verify(
    peer: Annotated[list[str] | None, typer.Option(help="NAME=HOST:PORT of a running peer; empty: start some.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Engines to start: mlx, llamacpp; default both.")] = None,
    network: Annotated[str, typer.Option(help="namespaces (needs root) or loopback.")] = "namespaces",
    decode_model: Annotated[str | None, typer.Option(help="Decode side's model, as embedded-gguf for 4-bit.")] = None,
    kv_type: Annotated[str | None, typer.Option(help="llama.cpp's cache type.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths, comma-separated.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    model: Model = None,
    dtype: Dtype = None,
    codec: Codec = None,
    secret_file: SecretFile = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json_output: JsonFlag = False,
) -> None:
    """Compare answers that were handed off with the same answers from one engine; exits 1 where they differ."""
    from sparkray.handoff.probe_text import DEFAULT_LENGTHS

    wanted = tuple(_integers(lengths)) if lengths else DEFAULT_LENGTHS
    longest = max(wanted) + max_tokens
    settings = _prefill_settings(config, overrides, model=model, dtype=dtype, codec=codec or "raw")
    changes: dict[str, Any] = {"max_model_len": max(settings.max_model_len, longest)}
    if "prefix_caching" not in settings.model_fields_set:
        # Rows that an earlier run left in the cache would leave at once, and streaming them would not be tried.
        changes["prefix_caching"] = False
    settings = settings.model_copy(update=changes)
    exact = settings.dtype == "float32" and settings.codec in ("raw", "lossless") and decode_model is None
    secret = secret_file or _own_secret()
    with ExitStack() as stack:
        if peer:
            addresses = dict(_named_address(each) for each in peer)
        else:
            from sparkray.config.base import validate_settings
            from sparkray.config.handoff import DecodeConfig

            decodes = [
                validate_settings(DecodeConfig, {
                    "engine": name, "model": decode_model or settings.model, "dtype": settings.dtype,
                    "kv_type": kv_type or {"float32": "f32", "bfloat16": "f16", "float16": "f16"}[settings.dtype],
                    "context_tokens": longest + 16, "max_sequences": 2, "secret_file": str(secret),
                    "insecure": True,
                })
                for name in engine or ("mlx", "llamacpp")
            ]  # fmt: skip
            folder = _temporary_folder(stack)
            prefix, addresses = _start_peers(stack, decodes, network, folder)
            if prefix:
                # From here on this process is only a frame: the prefill side runs inside its own namespace.
                prefill = folder / "prefill.json"
                prefill.write_text(settings.model_dump_json(), encoding="utf-8")
                inner = ["handoff", "verify", "--secret-file", str(secret), "--max-tokens", str(max_tokens),
                         "--lengths", ",".join(map(str, wanted)), "--config", str(prefill), "--codec", settings.codec,
                         *(["--decode-model", decode_model] if decode_model else []),
                         *(word for name, address in addresses.items() for word in ("--peer", f"{name}={address}")),
                         *(["--json"] if json_output else [])]  # fmt: skip
                raise typer.Exit(_run_inside(prefix, inner))
        peers = {name: _peer(address, secret, settings) for name, address in addresses.items()}

        async def run(prefiller: PrefillEngine) -> dict[str, Any]:
            from sparkray.handoff.probe_text import prompts_of
            from sparkray.handoff.verify import verify as compare

            prompts = prompts_of(prefiller.folder, prefiller.vocabulary, wanted)

            def tell(name: str, row: Mapping[str, Any]) -> None:
                line = (
                    f"{name}: {row['prompt_tokens']} tokens read, {row['matched']}/{max_tokens} equal, {row['verdict']}"
                )
                typer.echo(line, err=True)

            return await compare(prefiller, peers, prompts, max_tokens, exact=exact, on_row=tell)

        report = _with_prefill(settings, run)
    _print({**report, "model": settings.model, "dtype": settings.dtype, "codec": settings.codec}, json_output)
    if not report["ok"]:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A model of the table, or one given by --set.")] = "Llama-3.1-8B",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 8192,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 32,
    gbit: Annotated[float, typer.Option(min=0.001, help="Line rate of the link, Gbit/s.")] = 10.0,
    codec: Annotated[str, typer.Option(help="raw, lossless, int8 or k4v4.")] = "raw",
    prefill_rate: Annotated[float | None, typer.Option(min=0.001, help="Measured prompt tokens/s there.")] = None,
    decode_rate: Annotated[float | None, typer.Option(min=0.001, help="Measured answer tokens/s here.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Predict time to first token, total time and the best route for a DGX Spark and an M3 Ultra."""
    from sparkray.handoff.plan_report import plan_report

    _print(
        plan_report(
            model, prompt_tokens, output_tokens, gbit, codec, prefill_rate=prefill_rate, decode_rate=decode_rate
        ),
        json_output,
    )


def _prefill_settings(files: list[Path] | None, overrides: list[str] | None, **flags: Any) -> PrefillConfig:
    from sparkray.config.handoff import PrefillConfig

    return read_settings(PrefillConfig, files, overrides, flags)


def _with_prefill(settings: PrefillConfig, run: Any) -> dict[str, Any]:
    """Start the prefill engine, run, and end it whatever happened."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # One machine, one process group: no address of the outside is needed, and a namespace may have none.
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    # Standard output is for the result alone.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from sparkray.handoff.vllm_prefill import PrefillEngine

    async def whole() -> dict[str, Any]:
        prefiller = PrefillEngine(settings)
        try:
            result: dict[str, Any] = await run(prefiller)
        finally:
            prefiller.close()
        return result

    import asyncio

    return asyncio.run(whole())


async def _ask_plainly(url: str, prompt: str, model: str, max_tokens: int) -> dict[str, Any]:
    from sparkray.handoff.plain_route import REASON, plain_answer

    pieces = plain_answer(url, [{"role": "user", "content": prompt}], model=model, max_tokens=max_tokens)
    text = "".join([piece async for piece in pieces])
    return {"text": text, "handoff": "local", "reason": REASON}


def _temporary_folder(stack: ExitStack) -> Path:
    import tempfile

    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparkray-handoff-")))


def _start_peers(
    stack: ExitStack, decodes: list[DecodeConfig], network: str, folder: Path
) -> tuple[list[str], dict[str, str]]:
    """Decode peers of this machine: words that enter the prefill side's namespace, and addresses by engine."""
    from sparkray.handoff.local_peers import LocalPeer
    from sparkray.handoff.netns import DECODE_ADDRESS, Cable

    if network not in ("namespaces", "loopback"):
        raise UsageError(f"network {network!r} was given, and namespaces or loopback is expected.", param="network")
    enter_decode: list[str] = []
    enter_prefill: list[str] = []
    if network == "namespaces":
        cable = stack.enter_context(Cable())
        enter_decode, enter_prefill = cable.inside(cable.decode, []), cable.inside(cable.prefill, [])
        decodes = [each.model_copy(update={"host": DECODE_ADDRESS}) for each in decodes]
    started = {
        each.engine: stack.enter_context(LocalPeer(each, folder / f"{each.engine}.log", enter_decode))
        for each in decodes
    }
    return enter_prefill, {name: each.wait_ready() for name, each in started.items()}


def _run_inside(prefix: list[str], arguments: list[str]) -> int:
    import subprocess
    import sys

    return subprocess.run([*prefix, sys.executable, "-m", "sparkray.cli.main", *arguments], check=False).returncode


def _peer(address: str, secret_file: Path | None, settings: PrefillConfig) -> Peer:
    from sparkray.handoff.client import Peer

    path = secret_file or _own_secret()
    return Peer(address, path.expanduser().read_bytes().strip(), settings.tls, link=settings.link)


def _own_secret() -> Path:
    """The secret of this user's machine; made once. Copy it to the other machine of a pair."""
    import secrets

    from sparkray.models.cache import cache_root

    path = cache_root() / "handoff-secret"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.touch(mode=0o600)
        partial.write_text(secrets.token_hex(32), encoding="utf-8")
        partial.replace(path)
    return path


def _named_address(text: str) -> tuple[str, str]:
    name, separator, address = text.partition("=")
    if not separator:
        return text, text
    return name, address


def _integers(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 2:
        raise InputError(f"lengths {text!r} were given, and numbers of 2 or more, as 19,200, are expected.")
    return found


def _print(result: dict[str, Any], json_output: bool) -> None:
    from sparkray.telemetry.console import print_json

    if json_output:
        print_json(result)
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")
