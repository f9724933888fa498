"""How much of a transfer hides behind prefill, over a cable of 10 Gbit/s, 1 Gbit/s and 50 Mbit/s.

    python benchmarks/handoff_overlap.py --json          (Linux, root: two network namespaces)

The wire is the real one: sender, frames, checksums, credits and assembly, between two processes in two namespaces. The
prefill side is a clock: a slice of one layer becomes ready when an engine of the given rate would have computed it, so
that link and overlap are measured and not this machine's matrix products. For each link:

- `goodput_share`: plain bytes a second over the line rate, with all rows ready at once; beside it `socket_share`, what
  a bare socket between the same two processes carries, in turns with it: no protocol can do more on this machine;
- `hidden_share`: share of the wire time that ran before the last row was computed, with rows appearing at 70 % of the
  link; beside it what the cost model says;
- `exposed_seconds`: from the last row computed to all rows assembled, beside the model's;
- `blob_exposed_seconds`: the same rows sent after prefill has ended, in turns with the other.

Then stock vLLM reads prompts in one namespace and llama.cpp writes in the other, over the same links (`--no-engines`
leaves this out): `first_token_after_prefill_seconds` is measured, and predicted from the link's goodput above, the
prefill rate of the same requests, and what the last import and a step of decode take on an unshaped cable.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.handoff import DecodeConfig, LinkConfig, LinkRates, MachineRates, ModelShape, WireLimits
from sparkray.handoff.assembly import RowAssembly
from sparkray.handoff.errors import PeerRefusedError
from sparkray.handoff.local_peers import LocalPeer
from sparkray.handoff.messages import Accept, Ack, Commit, Done, Hello, decode_message, expect
from sparkray.handoff.netns import DECODE_ADDRESS, Cable
from sparkray.handoff.plan import ETHERNET_SHARE, GIGABIT, Work, handoff_times
from sparkray.handoff.rows import KvGeometry
from sparkray.handoff.sender import RowSender, RowSlice
from sparkray.handoff.tcp import Connection, connect, listen, set_up_sending
from sparkray.handoff.wire import FrameKind

# Llama-3.1-8B: 131,072 bytes a token.
GEOMETRY = KvGeometry(32, 8, 128, 128, "bfloat16")
CHUNK_TOKENS = 128
PORT = 7071
LINK = LinkConfig(credit_bytes=64 << 20, stall_timeout_seconds=60)
LIMITS = WireLimits(max_pending_bytes=4 << 30)
FILL = 0.7


class ClockFeed:
    """Slices of a prompt, each ready at its time."""

    def __init__(self, num_rows: int, tokens_per_second: float | None, *, blob: bool) -> None:
        self._slices = [
            RowSlice(layer, first, min(CHUNK_TOKENS, num_rows - first))
            for first in range(0, num_rows, CHUNK_TOKENS)
            for layer in range(GEOMETRY.num_layers)
        ]
        self._rate = tokens_per_second
        self._num_rows = num_rows
        self._blob = blob
        shape = (CHUNK_TOKENS, GEOMETRY.num_kv_heads, GEOMETRY.key_dim)
        self._keys = np.frombuffer(secrets.token_bytes(2 * int(np.prod(shape))), "<u2").reshape(shape)
        self.began_at = 0.0

    @property
    def prefill_seconds(self) -> float:
        return self._num_rows / self._rate if self._rate else 0.0

    def slice(self, index: int, timeout_seconds: float) -> RowSlice | None:
        self.began_at = self.began_at or time.monotonic()
        if index >= len(self._slices):
            return None
        piece = self._slices[index]
        if self._rate is not None:
            layers = GEOMETRY.num_layers
            done_rows = piece.start + piece.count * (piece.layer + 1) / layers
            ready = self.prefill_seconds if self._blob else done_rows / self._rate
            time.sleep(max(0.0, self.began_at + ready - time.monotonic()))
        return piece

    def read(self, piece: RowSlice) -> tuple[Any, Any]:
        return self._keys[: piece.count], self._keys[: piece.count]


def receive_forever() -> None:
    """The decode side's process: assembles what comes and drops it, until it is ended."""
    listener = listen(DECODE_ADDRESS, PORT, LINK)
    threading.Thread(target=receive_plainly, daemon=True).start()
    print("ready", flush=True)
    while True:
        sock, _ = listener.accept()
        with Connection(sock, LIMITS, LINK) as connection:
            hello = expect(connection.receive(), Hello)
            assembly, taken, told = RowAssembly(hello, LIMITS), 0, 0
            connection.send(Accept(hello.codecs[0], LINK.credit_bytes))
            while (frame := connection.receive()).kind is FrameKind.KV:
                assembly.add(frame)
                assembly.take()
                taken += len(frame.payload)
                # As the decode agent does.
                if taken - told >= LINK.credit_bytes // 16 or not connection.is_readable(0):
                    connection.send(Ack(taken))
                    told = taken
            message = decode_message(frame)
            assert isinstance(message, Commit)
            assembly.commit(message)
            connection.send(Done(kv_bytes=assembly.received_bytes))


def receive_plainly() -> None:
    """What a bare socket carries: reads to the end of a connection and says so, until the process is ended."""
    listener = listen(DECODE_ADDRESS, PORT + 1, LINK)
    scratch = bytearray(1 << 20)
    while True:
        sock, _ = listener.accept()
        with sock:
            while sock.recv_into(scratch):
                continue
            sock.sendall(b"!")


def send_plainly(num_bytes: int) -> float:
    """Seconds that a bare socket takes."""
    data = memoryview(secrets.token_bytes(1 << 20))
    with socket.create_connection((DECODE_ADDRESS, PORT + 1), timeout=60) as sock:
        set_up_sending(sock, LINK)
        began = time.monotonic()
        for first in range(0, num_bytes, len(data)):
            sock.sendall(data[: num_bytes - first])
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        return time.monotonic() - began


def send_once(num_rows: int, tokens_per_second: float | None, *, blob: bool) -> dict[str, float]:
    """One transfer, from the prefill side's namespace."""
    feed = ClockFeed(num_rows, tokens_per_second, blob=blob)
    hello = Hello(
        "r", "t", "f", {}, asdict(GEOMETRY), "h", num_rows + 1, 0, ("raw",)
    )  # fmt: skip
    sender = RowSender(lambda: connect(f"{DECODE_ADDRESS}:{PORT}", None, LIMITS, LINK), hello, feed, LINK)
    report = sender.run()
    seconds = report.done_at - feed.began_at
    return {
        "bytes": num_rows * GEOMETRY.row_bytes,
        "seconds": seconds,
        "exposed_seconds": max(0.0, seconds - feed.prefill_seconds),
        "prefill_seconds": feed.prefill_seconds,
    }


def send_all(gigabits: float, rounds: int, wire_seconds: float) -> dict[str, Any]:
    """All measurements of one link, in turns, from the prefill side's namespace."""
    line = gigabits * GIGABIT
    num_rows = max(CHUNK_TOKENS, int(line * wire_seconds / GEOMETRY.row_bytes))
    rate = FILL * line * ETHERNET_SHARE / GEOMETRY.row_bytes
    send_once(CHUNK_TOKENS, None, blob=False)
    plain_bytes = num_rows * GEOMETRY.row_bytes
    sockets, goodputs, streamed, blobs = [], [], [], []
    for _ in range(rounds):
        sockets.append(plain_bytes / send_plainly(plain_bytes))
        free = send_once(num_rows, None, blob=False)
        goodputs.append(free["bytes"] / free["seconds"])
        streamed.append(send_once(num_rows, rate, blob=False))
        blobs.append(send_once(num_rows, rate, blob=True))
    goodput = statistics.median(goodputs)
    exposed = statistics.median(each["exposed_seconds"] for each in streamed)
    blob_exposed = statistics.median(each["exposed_seconds"] for each in blobs)
    wire = num_rows * GEOMETRY.row_bytes / goodput
    shape = ModelShape(name="s", num_layers=32, num_kv_heads=8, head_dim=128, active_params=1)
    machine = MachineRates(name="m", source="set", prefill_tokens_per_second=rate, decode_tokens_per_second=1e9)
    last = CHUNK_TOKENS * GEOMETRY.layer_row_bytes
    predicted = handoff_times(
        shape, machine, machine, LinkRates(bytes_per_second=goodput, rtt_seconds=0.0002, last_frame_bytes=last),
        Work(num_rows, 1),
    )  # fmt: skip
    return {
        "gbit": gigabits,
        "megabytes": num_rows * GEOMETRY.row_bytes / 1e6,
        "goodput_gbit": goodput / GIGABIT,
        "goodput_share": goodput / line,
        "socket_share": statistics.median(sockets) / line,
        "hidden_share": max(0.0, 1 - exposed / wire),
        "predicted_hidden_share": predicted.hidden_share,
        "exposed_seconds": exposed,
        "predicted_exposed_seconds": predicted.exposed_seconds,
        "blob_exposed_seconds": blob_exposed,
        "prefill_seconds": streamed[0]["prefill_seconds"],
    }


def measure_link(gigabits: float, rounds: int, wire_seconds: float) -> dict[str, Any]:
    """One link: a cable of its own, a receiver in one namespace and the sender in the other."""
    me = [sys.executable, __file__]
    with Cable(gigabits) as cable:
        receiver = subprocess.Popen(
            cable.inside(cable.decode, [*me, "--role", "receive"]), stdout=subprocess.PIPE, text=True
        )
        try:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            words = [*me, "--role", "send", "--gbit", str(gigabits), "--rounds", str(rounds)]
            words += ["--wire-seconds", str(wire_seconds)]
            done = subprocess.run(
                cable.inside(cable.prefill, words), stdout=subprocess.PIPE, text=True, timeout=600, check=True
            )
        finally:
            receiver.kill()
            receiver.wait(10)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_engines(links: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """vLLM to llama.cpp over one cable, unshaped and then as each of the links."""
    with tempfile.TemporaryDirectory(prefix="handoff-overlap-") as folder, Cable() as cable:
        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(16))
        config = DecodeConfig(
            engine="llamacpp", host=DECODE_ADDRESS, insecure=True, secret_file=str(secret), context_tokens=1200,
            max_sequences=2,
        )  # fmt: skip
        with LocalPeer(config, Path(folder) / "peer.log", cable.inside(cable.decode, [])) as peer:
            script = Path(__file__).with_name("handoff_overlap_engines.py")
            words = [
                sys.executable, str(script), "--peer", peer.wait_ready(), "--secret-file", str(secret), "--rounds",
                str(rounds),
            ]  # fmt: skip
            prefill = subprocess.Popen(
                cable.inside(cable.prefill, words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert prefill.stdin is not None and prefill.stdout is not None
            try:
                prefill.stdout.readline()
                found = []
                for link in [None, *links]:
                    if link is not None:
                        cable.shape(link["gbit"])
                    prefill.stdin.write(f"goodput {link['goodput_gbit'] * GIGABIT if link else 0}\n")
                    prefill.stdin.flush()
                    row = json.loads(prefill.stdout.readline())
                    found.append({"gbit": link["gbit"] if link else None, **row})
            finally:
                prefill.stdin.close()
                prefill.wait(60)
    return {"engines": found}


def main() -> None:
    """Measure every link that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gbit", type=float, nargs="+", default=[10.0, 1.0, 0.05])
    parser.add_argument("--wire-seconds", type=float, default=1.5, help="payload that takes a link about so long")
    parser.add_argument("--engines", action=argparse.BooleanOptionalAction, default=True, help="vLLM and llama.cpp too")
    parser.add_argument("--role", choices=["all", "send", "receive"], default="all", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "receive":
        receive_forever()
    if arguments.role == "send":
        print(json.dumps(send_all(arguments.gbit[0], arguments.rounds, arguments.wire_seconds)))
        return
    links = []
    for gigabits in arguments.gbit:
        links.append(measure_link(gigabits, arguments.rounds, arguments.wire_seconds))
        if not arguments.json:
            print(links[-1])
    engines = measure_engines(links, arguments.rounds) if arguments.engines else {}
    result = {
        "benchmark": "handoff_overlap",
        "goodput_share": min(each["goodput_share"] for each in links),
        "hidden_share": min(each["hidden_share"] for each in links),
        "load_average": os.getloadavg()[0],
        "links": links,
        **engines,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    # A time limit from outside leaves no namespace behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        main()
    except PeerRefusedError as failure:
        raise SystemExit(str(failure)) from failure
