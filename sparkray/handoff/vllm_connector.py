"""vLLM's side of the handoff: a connector that stock vLLM loads by name.

    KVTransferConfig(kv_connector="SparkrayConnector", kv_role="kv_producer",
                     kv_connector_module_path="sparkray.handoff.vllm_connector", kv_connector_extra_config={...})

A request that is to be handed off carries `kv_transfer_params={"sparkray": {...}}` (`handing.PrefillOrder`). The
scheduler's half says at each step which rows of it are computed and where they lie; the worker's half opens a transfer
at the first of them and tells it, after each layer, that this layer's rows are there. Rows of a prefix that was cached
count as computed in the first step. The request's blocks are kept until its transfer has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sparkray.config.handoff import LinkConfig, TlsConfig, WireLimits
from sparkray.errors import SparkrayError, UsageError
from sparkray.handoff.codec_choice import CodecChoice
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import identity_from_wire, prompt_hash
from sparkray.handoff.handing import PrefillOrder
from sparkray.handoff.messages import Hello
from sparkray.handoff.paged_layout import PageLayout, check_page, read_rows
from sparkray.handoff.rows import Array, KvGeometry
from sparkray.handoff.sender import RowSender, RowSlice
from sparkray.handoff.stream import RowStream
from sparkray.handoff.tcp import connect

_logger = logging.getLogger(__name__)
PARAMS_KEY = "sparkray"
_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip
_KEYS_TRANSPOSED = ("vec", "vec16")


@dataclass
class _Tracked:
    """What the scheduler knows of a request under way."""

    order: PrefillOrder
    prompt_ids: list[int]
    block_ids: list[int]


@dataclass
class _Step:
    """Rows of one request that are computed in a step."""

    request_id: str
    end: int
    block_ids: list[int]
    order: PrefillOrder | None = None
    prompt_ids: list[int] = field(default_factory=list)


@dataclass
class HandoffMetadata(KVConnectorMetadata):
    """What the scheduler's half tells the worker's half at each step."""

    steps: list[_Step] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


class SparkrayConnector(KVConnectorBase_V1):
    """Sends rows as they are computed; loads none."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _check_engine(vllm_config, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._max_streams = int(extra.get("max_streams", 64))
        if role is KVConnectorRole.SCHEDULER:
            self._tracked: dict[str, _Tracked] = {}
            self._sending: set[str] = set()
            self._preempted: list[str] = []
            self._cancelled: list[str] = []
        else:
            self._worker = _Worker(extra, vllm_config)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # A whole-step graph would leave out the call after each layer.
        return True

    # Scheduler's half ---------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        return

    def build_connector_meta(self, scheduler_output: Any) -> HandoffMetadata:
        scheduled = scheduler_output.num_scheduled_tokens
        preempted = [each for each in scheduler_output.preempted_req_ids or () if each in self._tracked]
        meta = HandoffMetadata(preempted=preempted, cancelled=self._cancelled)
        self._cancelled = []
        for new in scheduler_output.scheduled_new_reqs:
            order = _read_order(new.sampling_params)
            if order is None or len(self._sending) >= self._max_streams:
                continue
            tracked = _Tracked(order, list(new.prompt_token_ids), list(new.block_ids[0]))
            self._tracked[new.req_id] = tracked
            self._sending.add(new.req_id)
            end = min(new.num_computed_tokens + scheduled[new.req_id], len(tracked.prompt_ids))
            meta.steps.append(_Step(new.req_id, end, list(tracked.block_ids), order, tracked.prompt_ids))
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            known = self._tracked.get(request_id)
            if known is None:
                continue
            fresh = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                known.block_ids = list(fresh[0])
            elif fresh is not None:
                known.block_ids += fresh[0]
            computed = cached.num_computed_tokens[index]
            end = min(computed + scheduled[request_id], len(known.prompt_ids))
            if computed < len(known.prompt_ids):
                meta.steps.append(_Step(request_id, end, list(known.block_ids)))
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        known = self._tracked.pop(request.request_id, None)
        if known is None:
            return False, None
        if request.num_computed_tokens < len(known.prompt_ids):
            self._cancelled.append(request.request_id)
        return True, {"sparkray": "sending"}

    def update_connector_output(self, connector_output: Any) -> None:
        self._sending -= set(connector_output.finished_sending or ())

    # Worker's half ------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        # Here and not in start_load_kv, which runs after the forward pass where nothing is loaded.
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, HandoffMetadata)
        self._worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        meta = self._get_connector_metadata()
        assert isinstance(meta, HandoffMetadata)
        self._worker.layer_done(layer_name, kv_layer, meta)

    def wait_for_save(self) -> None:
        return

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, HandoffMetadata)
        self._worker.lose(kv_connector_metadata.preempted)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._worker.take_ended(finished_req_ids), None

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.WORKER:
            self._worker.shutdown()


class _Worker:
    """The worker's half: streams, their senders, and the memory that rows are read from."""

    def __init__(self, extra: dict[str, Any], vllm_config: Any) -> None:
        self._identity = identity_from_wire(extra["identity"])
        self._link = LinkConfig(**extra.get("link", {}))
        self._limits = WireLimits(**extra.get("limits", {}))
        self._tls = TlsConfig(**extra["tls"]) if extra.get("tls") else None
        self._codec = str(extra.get("codec", "auto"))
        self._block_size = int(vllm_config.cache_config.block_size)
        self._streams: dict[str, RowStream] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._finished: set[str] = set()
        self._caches: dict[int, torch.Tensor] = {}
        self._layers: dict[str, int] = {}
        self._pages: PageLayout | None = None
        self._geometry: KvGeometry | None = None
        self._choice: CodecChoice | None = None
        self._copy_stream: Any = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._layers = {name: extract_layer_index(name) for name in kv_caches}
        first = next(iter(kv_caches.values()))
        check_page(first)
        if first.dtype not in _DTYPES:
            raise UsageError(f"the engine keeps its cache in {first.dtype}; float32, float16 and bfloat16 can be sent.")
        self._pages = _page_layout(first, self._block_size)
        self._geometry = KvGeometry(
            len(kv_caches), self._identity.num_kv_heads, self._identity.key_dim, self._identity.value_dim,
            _DTYPES[first.dtype],
        )  # fmt: skip
        self._choice = CodecChoice(self._geometry, self._codec)
        if first.is_cuda:
            self._copy_stream = torch.cuda.Stream(first.device)  # type: ignore[no-untyped-call]

    def begin_step(self, meta: HandoffMetadata) -> None:
        for request_id in meta.cancelled:
            self._streams[request_id].cancel("the request ended before its prompt was read.")
        for step in meta.steps:
            if step.order is not None:
                self._open(step, step.order)
            self._streams[step.request_id].set_blocks(step.block_ids)

    def layer_done(self, layer_name: str, kv_layer: torch.Tensor, meta: HandoffMetadata) -> None:
        layer = self._layers[layer_name]
        self._caches[layer] = kv_layer
        if self._copy_stream is not None and meta.steps:
            # What the copy reads must have been written: it waits for this point of the engine's stream.
            self._copy_stream.wait_stream(torch.cuda.current_stream(kv_layer.device))
        for step in meta.steps:
            self._streams[step.request_id].add_rows(layer, step.end)

    def lose(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._streams[request_id].lose_blocks()

    def take_ended(self, finished: set[str]) -> set[str]:
        """Requests that the engine has finished and whose transfers are over: their blocks can go."""
        self._finished |= finished & self._streams.keys()
        ended = {each for each in self._finished if not self._threads[each].is_alive()}
        for request_id in ended:
            del self._streams[request_id], self._threads[request_id]
        self._finished -= ended
        return ended

    def shutdown(self) -> None:
        for stream in self._streams.values():
            stream.cancel("the prefill side shuts down.")

    def _open(self, step: _Step, order: PrefillOrder) -> None:
        geometry, choice = self._geometry, self._choice
        assert geometry is not None and choice is not None
        num_tokens = len(step.prompt_ids)
        hello = Hello(
            request=order.request,
            ticket=order.ticket,
            fingerprint=self._identity.digest,
            identity=self._identity.to_wire(),
            geometry=asdict(geometry),
            prompt_hash=prompt_hash(step.prompt_ids),
            prompt_tokens=num_tokens,
            start=order.start,
            codecs=choice.offer(num_tokens),
            purpose="canary" if order.purpose == "canary" else "serve",
        )
        stream = RowStream(geometry.num_layers, order.start, num_tokens - 1, self._read)
        sender = RowSender(
            lambda: connect(order.address, self._tls, self._limits, self._link), hello, stream, self._link
        )
        thread = threading.Thread(target=self._send, args=(sender, stream, num_tokens), daemon=True)
        self._streams[step.request_id] = stream
        self._threads[step.request_id] = thread
        thread.start()

    def _send(self, sender: RowSender, stream: RowStream, num_tokens: int) -> None:
        """Top of the sender's thread: what goes wrong is the decode side's to tell, and logged here."""
        begin = time.monotonic()
        try:
            report = sender.run()
        except SparkrayError as failure:
            _logger.warning("a handoff ended early: %s", failure)
            return
        assert self._choice is not None
        busy = report.done_at - begin
        self._choice.learn(report, num_tokens, stream.computed_at - stream.began_at, busy)

    def _read(self, piece: RowSlice, block_ids: list[int]) -> tuple[Array, Array]:
        cache, layout = self._caches[piece.layer], self._pages
        assert layout is not None
        if self._copy_stream is None:
            keys, values = read_rows(cache, layout, block_ids, piece.start, piece.count)
        else:
            with torch.cuda.stream(self._copy_stream):
                on_device = read_rows(cache, layout, block_ids, piece.start, piece.count)
                keys, values = (part.to("cpu", non_blocking=False) for part in on_device)
        return _as_numpy(keys), _as_numpy(values)


def _as_numpy(rows: torch.Tensor) -> Array:
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view("<u2")
    array: Array = rows.numpy()
    return array


def _read_order(sampling_params: Any) -> PrefillOrder | None:
    params = ((sampling_params.extra_args or {}).get("kv_transfer_params") or {}) if sampling_params else {}
    order = params.get(PARAMS_KEY)
    return PrefillOrder(**order) if order else None


def _check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse engines whose rows are not whole in one process, or not plain."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ProtocolError(
            Reason.UNSUPPORTED,
            f"tensor_parallel_size={parallel.tensor_parallel_size} and pipeline_parallel_size="
            f"{parallel.pipeline_parallel_size} were set; rows are sent from an engine on one device.",
        )
    groups = kv_cache_config.kv_cache_groups
    plain = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
    if not plain or getattr(groups[0].kv_cache_spec, "sliding_window", None):
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        raise ProtocolError(
            Reason.UNSUPPORTED, f"the model keeps caches of kind {', '.join(kinds)}; one of full attention can be sent."
        )


def _page_layout(cache: torch.Tensor, block_size: int) -> PageLayout:
    if cache.device.type != "cpu":
        return PageLayout.TOKEN_PAIRS
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(cache.dtype, block_size, cache.shape[-1] // 2)
    if isa not in _KEYS_TRANSPOSED:
        raise ProtocolError(
            Reason.UNSUPPORTED,
            f"this CPU's attention kernels ({isa}) lay pages out in a way that is not read yet.",
            hint="On x86 with AMX, set dtype float32 or a block_size that 32 does not divide.",
        )
    return PageLayout.PLANES_KEYS_TRANSPOSED
