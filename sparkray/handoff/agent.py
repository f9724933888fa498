"""The decode side as a process: listens, takes rows, answers. `sparkray handoff decode` runs it on the Mac.

A thread a connection reads frames; one thread alone touches the engine, in the order in which work comes, so rows
that arrive and tokens of other answers take turns. Rows are acknowledged when they are in the engine: a slow engine
slows its senders, and nothing piles up here.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparkray.config.handoff import DecodeConfig
from sparkray.errors import SparkrayError, UnavailableError, WaitTimeoutError
from sparkray.handoff.canary import run_canary, tolerance_for
from sparkray.handoff.client_ear import ClientEar
from sparkray.handoff.codecs.choose import writes
from sparkray.handoff.engine import DecodeEngine
from sparkray.handoff.errors import PeerRefusedError, ProtocolError, Reason
from sparkray.handoff.fingerprint import compare_identities, identity_from_wire, prompt_hash
from sparkray.handoff.generation import Generation
from sparkray.handoff.messages import (
    Abort,
    Accept,
    Ack,
    Commit,
    Done,
    Generate,
    Hello,
    Release,
    Status,
    check_hello,
    decode_message,
)
from sparkray.handoff.pool import SequencePool
from sparkray.handoff.rows import KvRows
from sparkray.handoff.tcp import Connection, listen, tls_context
from sparkray.handoff.tickets import TicketBook
from sparkray.handoff.transfer import Transfer
from sparkray.handoff.wire import FrameKind

_logger = logging.getLogger(__name__)
# An engine call that takes longer is not coming back.
_ENGINE_TIMEOUT_SECONDS = 600.0
# An acknowledgement for each such share of the credit: one for every frame costs both sides more than the frame.
_ACKS_OF_CREDIT = 16
# Pairings that are remembered.
_MAX_PAIRS = 64


class DecodeAgent:
    """A listening decode engine.

    Args:
        config: the settings.
        create: loads the engine; called on the thread that will use it.

    Raises:
        UnavailableError: the address cannot be listened at.
    """

    def __init__(self, config: DecodeConfig, create: Callable[[DecodeConfig], DecodeEngine]) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="handoff-engine")
        self.engine: DecodeEngine = self._thread.submit(create, config).result()
        self.identity = self.engine.identity
        self._pool = SequencePool(self.engine, config.max_sequences)
        self.secret = _read_secret(config)
        self._tickets = TicketBook(self.secret)
        self._tls = tls_context(config.tls, server=True) if config.tls else None
        self._transfers: dict[str, Transfer] = {}
        self._pairs: dict[tuple[str, str, str], float] = {}
        self._lock = threading.Lock()
        self._places = threading.Semaphore(config.max_connections)
        self._stopped = threading.Event()
        self._listener = listen(config.host, config.port, config.link)
        self._listener.settimeout(0.5)
        self.port = int(self._listener.getsockname()[1])

    @property
    def address(self) -> str:
        return f"{self._config.host}:{self.port}"

    def serve(self) -> None:
        """Answer connections until `stop`."""
        while not self._stopped.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                break
            if not self._places.acquire(blocking=False):
                self._turn_away(sock)
                continue
            threading.Thread(target=self._hold_place, args=(sock,), daemon=True).start()
        self._listener.close()

    def start(self) -> None:
        """`serve` on a thread of its own."""
        threading.Thread(target=self.serve, daemon=True).start()

    def stop(self) -> None:
        """Stop listening and unload the engine."""
        self._stopped.set()
        self._listener.close()
        self._thread.submit(self.engine.close)
        self._thread.shutdown()

    def _hold_place(self, sock: socket.socket) -> None:
        try:
            self._answer(sock)
        finally:
            self._places.release()

    def _turn_away(self, sock: socket.socket) -> None:
        """Over the bound: one short word, and no thread."""
        with Connection(sock, self._config.limits, self._config.link) as connection:
            failure = ProtocolError(Reason.BUSY, f"{self._config.max_connections} connections are open already.")
            # TLS peers see the connection end; a handshake would cost what the bound is there to save.
            if self._tls is None:
                try:
                    connection.send(Abort(failure.reason, failure.message))
                except (OSError, SparkrayError):
                    _logger.info("a connection over the bound was gone before it was told")

    def _answer(self, sock: socket.socket) -> None:
        link = self._config.link
        try:
            sock.settimeout(link.connect_timeout_seconds)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            connection = Connection(sock, self._config.limits, link)
        except (OSError, ssl.SSLError) as failure:
            _logger.info("a connection did not come up: %s", failure)
            sock.close()
            return
        with connection:
            try:
                message = decode_message(connection.receive())
                if isinstance(message, Hello):
                    self._take_rows(connection, message)
                elif isinstance(message, Generate):
                    self._generate(connection, message)
                elif isinstance(message, Release):
                    self._on_engine(self._pool.forget, message.conversation)
                    connection.send(Done())
                else:
                    raise ProtocolError(Reason.ORDER, f"a connection began with {type(message).__name__}.")
            except ProtocolError as failure:
                _logger.info("refused: %s", failure)
                connection.refuse(failure)
            except WaitTimeoutError as failure:
                connection.refuse(ProtocolError(Reason.TIMEOUT, failure.message))
            except SparkrayError as failure:
                connection.refuse(ProtocolError(Reason.ENGINE, str(failure)))
            except (OSError, EOFError) as failure:
                _logger.info("a peer went away: %r", failure)

    # Rows ---------------------------------------------------------------------------------------------------------

    def _take_rows(self, connection: Connection, hello: Hello) -> None:
        self._tickets.check(hello.ticket, hello.request, hello.prompt_hash, time.time())
        transfer = self._transfers.get(hello.request)
        if transfer is None:
            raise ProtocolError(Reason.ORDER, f"rows of request {hello.request!r} came, and nobody awaits them.")
        try:
            self._check_sender(hello)
            assembly = transfer.begin(hello, self._config.limits)
            codec = next((codec for codec in hello.codecs if writes(codec, assembly.geometry)), None)
            if codec is None:
                raise ProtocolError(Reason.UNSUPPORTED, f"none of the codecs {hello.codecs} writes these rows.")
        except ProtocolError as refusal:
            transfer.fail(refusal.reason)
            raise
        connection.send(Accept(codec, self._config.link.credit_bytes, assembly.have))
        try:
            self._receive(connection, transfer)
        except ProtocolError as failure:
            # Damage on the way can be mended by sending again; anything else will not get better.
            if failure.reason in (Reason.CHECKSUM, Reason.CUT):
                transfer.note_break(failure.reason)
            else:
                transfer.fail(failure.reason)
            raise
        except PeerRefusedError as failure:
            transfer.fail(failure.reason)
        except (OSError, EOFError, WaitTimeoutError):
            transfer.note_break(Reason.CUT)
            raise

    def _check_sender(self, hello: Hello) -> None:
        prefill = identity_from_wire(hello.identity)
        if prefill.digest != hello.fingerprint:
            raise ProtocolError(Reason.FINGERPRINT, "the fingerprint is not that of the identity beside it.")
        compare_identities(prefill, self.identity)
        geometry = check_hello(hello, self._config.limits)
        here = (self.identity.num_layers, self.identity.num_kv_heads, self.identity.key_dim, self.identity.value_dim)
        there = (geometry.num_layers, geometry.num_kv_heads, geometry.key_dim, geometry.value_dim)
        if here != there:
            raise ProtocolError(Reason.GEOMETRY, f"rows of shape {there} were announced, and the model has {here}.")
        if hello.prompt_tokens >= self.engine.context_tokens:
            raise ProtocolError(
                Reason.CONTEXT,
                f"a prompt of {hello.prompt_tokens} tokens was announced; the decode side's context has"
                f" {self.engine.context_tokens}, and the answer needs room as well.",
                hint="Raise context_tokens there.",
            )
        if hello.purpose == "serve" and self._config.require_pairing and self._pair_of(hello) not in self._pairs:
            raise ProtocolError(
                Reason.NOT_PAIRED,
                "rows of this model have not passed the canary here.",
                hint="Run a pairing first; sparkray handoff verify and ask do.",
            )

    def _pair_of(self, hello: Hello) -> tuple[str, str, str]:
        return hello.fingerprint, str(hello.identity.get("weights")), str(hello.geometry.get("dtype"))

    def _receive(self, connection: Connection, transfer: Transfer) -> None:
        assembly = transfer.assembly
        assert assembly is not None
        taken = told = 0
        while True:
            frame = connection.receive()
            if frame.kind is FrameKind.KV:
                assembly.add(frame)
                rows = assembly.take()
                if rows is not None:
                    self._on_engine(self._import, transfer, rows)
                transfer.note_progress()
                taken += len(frame.payload)
                # Told in steps while rows keep coming, at once where the sender may be waiting for it.
                if taken - told >= self._config.link.credit_bytes // _ACKS_OF_CREDIT or not connection.is_readable(0):
                    connection.send(Ack(taken))
                    told = taken
                continue
            message = decode_message(frame)
            if isinstance(message, Abort):
                raise PeerRefusedError(message.reason, message.message)
            if not isinstance(message, Commit):
                raise ProtocolError(Reason.ORDER, f"{type(message).__name__} came among rows.")
            assembly.commit(message)
            transfer.finish()
            connection.send(Done(rows_received=assembly.whole_rows - transfer.start, kv_bytes=assembly.received_bytes))
            return

    def _import(self, transfer: Transfer, rows: KvRows) -> None:
        """On the engine's thread: rows into the sequence, unless the answer has gone on without them."""
        if transfer.is_closed:
            raise ProtocolError(Reason.CANCELLED, "the answer went on without these rows.")
        transfer.sink(rows)

    # Answers ------------------------------------------------------------------------------------------------------

    def _generate(self, connection: Connection, request: Generate) -> None:
        self._tickets.check(request.ticket, request.request, prompt_hash(request.prompt), time.time())
        self._check_request(request)
        if request.purpose == "canary":
            self._run_canary(connection, request)
            return
        held = self._on_engine(self._pool.acquire, request.conversation, request.prompt)
        keep = False
        transfer = None
        try:
            if request.route == "handoff":
                transfer = self._open_transfer(request, len(held.token_ids), held.sequence.import_rows)
            connection.send(Status(len(held.token_ids), self.identity.digest, self._pool.num_busy))
            client = ClientEar(connection, transfer)
            done = Generation(request, held, transfer, self._on_engine, client.send, client.listen).run()
            keep = True
        finally:
            self._close_transfer(request, transfer)
            self._on_engine(lambda: self._pool.release(held, keep=keep))
        # Told last: the next turn may come at once, and finds the rows of this one in their place.
        connection.send(done)

    def _check_request(self, request: Generate) -> None:
        longest = len(request.prompt) + max(request.max_tokens, len(request.resume))
        if len(request.prompt) < 2 or request.max_tokens < 1 or request.temperature < 0 or not 0 < request.top_p <= 1:
            raise ProtocolError(
                Reason.MALFORMED,
                "2 or more prompt tokens, max_tokens of 1 or more, a temperature of 0 or more and top_p above 0 up to 1"
                " are accepted.",
            )
        if longest > self.engine.context_tokens:
            raise ProtocolError(
                Reason.CONTEXT,
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} of answer exceed the context of"
                f" {self.engine.context_tokens} tokens.",
                hint="Raise context_tokens on the decode side, or ask for fewer tokens.",
            )

    def _open_transfer(self, request: Generate, start: int, sink: Callable[[KvRows], None]) -> Transfer:
        transfer = Transfer(request, start, sink)
        with self._lock:
            if request.request in self._transfers:
                raise ProtocolError(Reason.REPLAYED, f"request {request.request!r} is under way.")
            # Again under the lock: it may have ended between the first look at its ticket and now.
            self._tickets.check(request.ticket, request.request, prompt_hash(request.prompt), time.time())
            self._transfers[request.request] = transfer
        return transfer

    def _close_transfer(self, request: Generate, transfer: Transfer | None) -> None:
        if transfer is not None:
            transfer.fail(transfer.last_reason or Reason.CANCELLED)
        with self._lock:
            self._transfers.pop(request.request, None)
            self._tickets.finish(request.request, request.ticket, time.time())

    def _run_canary(self, connection: Connection, request: Generate) -> None:
        rows: list[KvRows] = []
        transfer = self._open_transfer(request, 0, rows.append)
        try:
            connection.send(Status(0, self.identity.digest, self._pool.num_busy))
            if not transfer.wait_for_rows(request.rows_timeout_seconds, ClientEar(connection, transfer).listen):
                raise ProtocolError(Reason(transfer.last_reason), "the probe's rows did not come.")
            assembly = transfer.assembly
            assert assembly is not None
            hello = assembly.hello
            prefill = identity_from_wire(hello.identity)
            tolerance = tolerance_for(
                prefill.weights, self.identity.weights, (assembly.geometry.dtype, self._config.dtype)
            )
            report = self._on_engine(run_canary, self.engine, list(request.prompt), rows, tolerance)
            if report.passed:
                while len(self._pairs) >= _MAX_PAIRS:
                    del self._pairs[next(iter(self._pairs))]
                self._pairs[self._pair_of(hello)] = time.time()
        finally:
            self._close_transfer(request, transfer)
        connection.send(Done(report=report.to_wire(), kv_bytes=transfer.received_bytes))

    def _on_engine(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._stopped.is_set():
            raise UnavailableError("the decode side is stopping.")
        try:
            return self._thread.submit(function, *arguments).result(_ENGINE_TIMEOUT_SECONDS)
        except TimeoutError as failure:
            raise WaitTimeoutError(f"the engine did not answer within {_ENGINE_TIMEOUT_SECONDS:.0f} s.") from failure


def _read_secret(config: DecodeConfig) -> bytes:
    """The shared secret; where none is set, one that this process alone knows."""
    if config.secret_file is None:
        return secrets.token_bytes(32)
    return Path(config.secret_file).expanduser().read_bytes().strip()
