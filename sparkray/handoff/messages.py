"""What control frames say: JSON objects with fixed keys, read strictly, and the small header inside KV frames.

prefill side                         decode side
HELLO    ------------------------->
         <-------------------------  ACCEPT   (or ABORT)
KV x N   ------------------------->
         <-------------------------  ACK      (bytes taken so far: credit)
COMMIT   ------------------------->
         <-------------------------  DONE     (or ABORT)

coordinator                          decode side
GENERATE ------------------------->
         <-------------------------  STATUS   (rows it has already)
CONFIRM  ------------------------->           (the prefill side's likeliest first tokens)
         <-------------------------  TOKENS x N, DONE (or ABORT)
RELEASE  ------------------------->           (the conversation is over; its rows can go)
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sparkray.config.handoff import CodecName, KvDtypeName, WireLimits
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.rows import KvGeometry
from sparkray.handoff.wire import Buffer, Frame, FrameKind, encode_frame

Ranges = tuple[tuple[int, int], ...]

CODECS: tuple[CodecName, ...] = ("raw", "int8", "k4v4", "lossless")
DTYPES: tuple[KvDtypeName, ...] = ("float32", "float16", "bfloat16")
_KV = struct.Struct("<IIIBBHQ")
KV_HEADER_BYTES = _KV.size


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens a transfer, or takes a broken one up again (same request and ticket).

    Attributes:
        request: name of the request, as in the ticket.
        ticket: what the coordinator signed.
        fingerprint: digest of the prefill side's identity (`fingerprint.py`); compared before any byte of KV.
        identity: the identity itself, so that a refusal can name what differs.
        geometry: shape of the rows.
        prompt_hash: of the prompt's token ids.
        prompt_tokens: tokens of the prompt. Rows are one fewer: the decode side computes the last one itself.
        start: first row that is sent; the peer has those before it.
        codecs: what this side can write, best first.
        purpose: "serve", or "canary" for the probe of a pairing.
    """

    request: str
    ticket: str
    fingerprint: str
    identity: dict[str, Any]
    geometry: dict[str, Any]
    prompt_hash: str
    prompt_tokens: int
    start: int
    codecs: tuple[CodecName, ...]
    purpose: Literal["serve", "canary"] = "serve"

    kind = FrameKind.HELLO

    @property
    def kv_geometry(self) -> KvGeometry:
        return read_geometry(self.geometry)

    @property
    def num_rows(self) -> int:
        """Rows that the decode side needs in all."""
        return self.prompt_tokens - 1


@dataclass(frozen=True, slots=True)
class Accept:
    """The decode side takes the transfer.

    Attributes:
        codec: what to write.
        credit_bytes: how many payload bytes may be unacknowledged.
        have: sequence numbers that arrived before a break, as half-open ranges.
    """

    codec: CodecName
    credit_bytes: int
    have: Ranges = ()

    kind = FrameKind.ACCEPT


@dataclass(frozen=True, slots=True)
class Ack:
    """Payload bytes of KV frames taken since the connection began."""

    taken_bytes: int

    kind = FrameKind.ACK


@dataclass(frozen=True, slots=True)
class Commit:
    """All rows were sent.

    Attributes:
        num_frames: KV frames of the whole transfer.
        num_rows: rows up to which every layer is whole.
        root: hexadecimal checksum over all frame digests.
        prefill_seconds: from the first step of the request to the last.
    """

    num_frames: int
    num_rows: int
    root: str
    prefill_seconds: float = 0.0

    kind = FrameKind.COMMIT


@dataclass(frozen=True, slots=True)
class Abort:
    """The transfer, or the request, is over. `reason` is one of `errors.Reason`."""

    reason: str
    message: str = ""

    kind = FrameKind.ABORT


@dataclass(frozen=True, slots=True)
class Generate:
    """Asks the decode side for tokens.

    Attributes:
        request: name of the request; rows arrive under the same one.
        ticket: what the coordinator signed.
        prompt: token ids.
        resume: tokens of the answer that another peer has given already; they count towards `max_tokens`.
        route: "handoff" waits for rows, "local" computes them here.
        conversation: rows are kept under this name after the answer; empty: they are not.
        rows_timeout_seconds: how long to wait for the next rows before computing them here.
        confirm: whether a CONFIRM follows, and the first token waits for it.
        stop_ids: tokens that end the answer; they are not given out.
        purpose: "canary" compares the rows that come with rows computed here, and answers with the report.
    """

    request: str
    ticket: str
    prompt: tuple[int, ...]
    max_tokens: int
    resume: tuple[int, ...] = ()
    route: Literal["handoff", "local"] = "handoff"
    conversation: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    rows_timeout_seconds: float = 20.0
    confirm: bool = False
    stop_ids: tuple[int, ...] = ()
    purpose: Literal["serve", "canary"] = "serve"

    kind = FrameKind.GENERATE


@dataclass(frozen=True, slots=True)
class Status:
    """Answer to GENERATE: rows that are here already, and the model's digest."""

    cached_rows: int
    fingerprint: str
    queue: int = 0

    kind = FrameKind.STATUS


@dataclass(frozen=True, slots=True)
class Confirm:
    """The prefill side's likeliest first tokens with their natural log probabilities, likeliest first.

    None of them: it has ended, and no further connection of it will come; said at once or after the tokens.
    """

    request: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    kind = FrameKind.CONFIRM


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of the answer; `index` is the first one's place, so that none is lost or told twice.

    Attributes:
        margins: difference of the two largest logits at each.
        verdict: how the prompt's rows came, as in `Done`; decided before the first token is.
        reason: why not all of them came over the wire.
    """

    index: int
    token_ids: tuple[int, ...]
    margins: tuple[float, ...] = ()
    verdict: str = ""
    reason: str = ""

    kind = FrameKind.TOKENS


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer or of a transfer.

    Attributes:
        finish_reason: "stop" or "length"; empty at the end of a transfer.
        verdict: "full", "partial" or "local": how much of the prompt came from the prefill side.
        reason: why not all of it, as `errors.Reason`; empty for "full".
        rows_received: rows that came over the wire and were used.
        rows_cached: rows that were here before.
        rows_computed: rows that this side computed.
        kv_bytes: payload bytes of KV frames that arrived for this request.
        times: named moments, seconds on this side's clock since GENERATE arrived.
        report: result of a canary.
    """

    finish_reason: str = ""
    verdict: str = ""
    reason: str = ""
    rows_received: int = 0
    rows_cached: int = 0
    rows_computed: int = 0
    kv_bytes: int = 0
    times: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    kind = FrameKind.DONE


@dataclass(frozen=True, slots=True)
class Release:
    """The rows kept under this conversation can go."""

    conversation: str

    kind = FrameKind.RELEASE


Message = Hello | Accept | Ack | Commit | Abort | Generate | Status | Confirm | Tokens | Done | Release
MessageT = TypeVar("MessageT", bound=Message)

_TYPES: dict[FrameKind, type[Any]] = {
    kind.kind: kind for kind in (Hello, Accept, Ack, Commit, Abort, Generate, Status, Confirm, Tokens, Done, Release)
}
_ADAPTERS: dict[FrameKind, TypeAdapter[Any]] = {kind: TypeAdapter(cls) for kind, cls in _TYPES.items()}
_NAMES = {kind: {each.name for each in fields(cls)} for kind, cls in _TYPES.items()}
_GEOMETRY = TypeAdapter(KvGeometry)
assert all(get_type_hints(cls) for cls in _TYPES.values())


@dataclass(frozen=True, slots=True)
class KvPart:
    """Header inside a KV frame: which rows of which layer, and how they are written.

    Attributes:
        layer: index of the layer.
        start: position of the first row.
        count: rows.
        codec: how the bytes that follow are to be read.
        dtype: type of the numbers before the codec, and after reading.
        raw_bytes: size after reading; agrees with the geometry or the frame is refused.
    """

    layer: int
    start: int
    count: int
    codec: CodecName
    dtype: KvDtypeName
    raw_bytes: int

    def encode(self) -> bytes:
        return _KV.pack(
            self.layer, self.start, self.count, CODECS.index(self.codec), DTYPES.index(self.dtype), 0, self.raw_bytes
        )


def encode_message(message: Message) -> bytes:
    """A control message as a whole frame."""
    body = json.dumps(asdict(message), separators=(",", ":"), allow_nan=False)
    return encode_frame(message.kind, body.encode())


def decode_message(frame: Frame) -> Message:
    """Read a control frame.

    Raises:
        ProtocolError: not JSON, keys or types other than the message's.
    """
    if frame.kind not in _ADAPTERS:
        raise ProtocolError(Reason.MALFORMED, f"a {frame.kind.name} frame came where a control message is expected.")
    try:
        body = json.loads(bytes(frame.payload))
        if not isinstance(body, dict) or not body.keys() <= _NAMES[frame.kind]:
            raise ProtocolError(
                Reason.MALFORMED, f"a {frame.kind.name} frame holds other keys than {sorted(_NAMES[frame.kind])}."
            )
        message: Message = _ADAPTERS[frame.kind].validate_python(body)
    except (ValueError, RecursionError, ValidationError) as failure:
        raise ProtocolError(Reason.MALFORMED, f"a {frame.kind.name} frame cannot be read: {failure}.") from failure
    return message


def expect(frame: Frame, kind: type[MessageT]) -> MessageT:
    """The frame as the message that must come now.

    Raises:
        ProtocolError: another kind of frame.
    """
    message = decode_message(frame)
    if not isinstance(message, kind):
        raise ProtocolError(Reason.ORDER, f"a {frame.kind.name} frame came where {kind.kind.name} is expected.")
    return message


def decode_kv(frame: Frame) -> tuple[KvPart, memoryview]:
    """Header and body of a KV frame; nothing is checked against a geometry yet.

    Raises:
        ProtocolError: too short, or an unknown codec or type.
    """
    if len(frame.payload) < KV_HEADER_BYTES:
        raise ProtocolError(Reason.MALFORMED, f"a KV frame of {len(frame.payload)} bytes has no room for its header.")
    layer, start, count, codec, dtype, zero, raw_bytes = _KV.unpack_from(frame.payload)
    if codec >= len(CODECS) or dtype >= len(DTYPES) or zero:
        raise ProtocolError(Reason.MALFORMED, f"a KV frame names codec {codec} and type {dtype}, which are not known.")
    part = KvPart(layer, start, count, CODECS[codec], DTYPES[dtype], raw_bytes)
    return part, frame.payload[KV_HEADER_BYTES:]


def read_geometry(body: dict[str, Any]) -> KvGeometry:
    """A geometry as HELLO carries it.

    Raises:
        ProtocolError: keys or types other than a geometry's.
    """
    try:
        return _GEOMETRY.validate_python(body)
    except ValidationError as failure:
        raise ProtocolError(Reason.MALFORMED, f"the geometry cannot be read: {failure}.") from failure


def check_hello(hello: Hello, limits: WireLimits) -> KvGeometry:
    """Judge sizes before memory is taken; gives the geometry.

    Raises:
        ProtocolError: anything out of bounds.
    """
    geometry = hello.kv_geometry
    numbers = (geometry.num_layers, geometry.num_kv_heads, geometry.key_dim, geometry.value_dim)
    if min(numbers) < 1 or hello.prompt_tokens < 2 or not 0 <= hello.start <= hello.num_rows:
        raise ProtocolError(
            Reason.MALFORMED,
            f"geometry {numbers} with rows {hello.start} to {hello.num_rows} was announced; sizes of at least 1, a"
            " prompt of at least 2 tokens and a start inside it are accepted.",
        )
    for given, accepted, what in (
        (hello.prompt_tokens, limits.max_prompt_tokens, "prompt tokens"),
        (geometry.num_layers, limits.max_layers, "layers"),
        (geometry.layer_row_bytes, limits.max_row_bytes, "bytes of a row in one layer"),
        ((hello.num_rows - hello.start) * geometry.row_bytes, limits.max_kv_bytes, "bytes of keys and values"),
    ):
        if given > accepted:
            raise ProtocolError(Reason.TOO_LARGE, f"{given} {what} were announced; {accepted} are accepted.")
    return geometry


def ranges_of(numbers: list[int]) -> Ranges:
    """Ascending numbers as half-open ranges."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] = number + 1
        else:
            found.append([number, number + 1])
    return tuple((first, last) for first, last in found)


def as_bytes(array_buffer: Buffer) -> memoryview:
    """Memory of an array as bytes, without a copy."""
    return memoryview(array_buffer).cast("B")
