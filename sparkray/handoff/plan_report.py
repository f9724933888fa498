"""The report of `sparkray handoff plan`: three routes on a DGX Spark and an M3 Ultra."""

from __future__ import annotations

from typing import Any

from sparkray.errors import InputError
from sparkray.handoff.plan import (
    CODEC_BITS,
    EXO_MAC,
    EXO_SPARK,
    LLAMA_8B,
    MODELS,
    Work,
    alone_times,
    ethernet,
    handoff_times,
    hides,
    scaled_rates,
)


def plan_report(
    model: str,
    prompt_tokens: int,
    output_tokens: int,
    gbit: float,
    codec: str,
    *,
    prefill_rate: float | None = None,
    decode_rate: float | None = None,
) -> dict[str, Any]:
    """Predicted times of the three routes, and whether the transfer hides.

    Args:
        prefill_rate: measured rate of the prefill side; None: EXO's, scaled by the model's size.
        decode_rate: measured rate of the decode side.

    Raises:
        InputError: a model or codec that is not in the tables.
    """
    shapes = {shape.name: shape for shape in MODELS}
    if model not in shapes:
        raise InputError(f"model {model!r} was asked for, and {', '.join(shapes)} are known.", param="model")
    if codec not in CODEC_BITS:
        raise InputError(f"codec {codec!r} was asked for, and {', '.join(CODEC_BITS)} are known.", param="codec")
    shape = shapes[model]
    spark, mac = scaled_rates(EXO_SPARK, LLAMA_8B, shape), scaled_rates(EXO_MAC, LLAMA_8B, shape)
    if prefill_rate is not None:
        spark = spark.model_copy(update={"prefill_tokens_per_second": prefill_rate, "source": "given"})
    if decode_rate is not None:
        mac = mac.model_copy(update={"decode_tokens_per_second": decode_rate, "source": "given"})
    share = CODEC_BITS[codec] / 16
    # What can leave only when the last layer of the last chunk of 2,048 tokens is there.
    last_frame = min(2048, prompt_tokens) * shape.kv_bytes_per_token * share / shape.num_layers
    link = ethernet(gbit, last_frame_bytes=last_frame)
    work = Work(prompt_tokens, output_tokens)
    routes = [
        alone_times("prefill_node", spark, work),
        alone_times("decode_node", mac, work),
        handoff_times(shape, spark, mac, link, work, share),
    ]
    best = min(routes, key=lambda each: each.total_seconds)
    made = spark.prefill_tokens_per_second * shape.kv_bytes_per_token * share
    return {
        "model": model,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "codec": codec,
        "best_route": best.route,
        "speedup_over_decode_node": routes[1].total_seconds / routes[2].total_seconds,
        "speedup_over_prefill_node": routes[0].total_seconds / routes[2].total_seconds,
        "hidden": hides(shape, spark.prefill_tokens_per_second, link, share),
        "kv_gbit_per_second": made * 8 / 1e9,
        "link_gbit_per_second": link.bytes_per_second * 8 / 1e9,
        "routes": {
            each.route: {
                "prefill_seconds": each.prefill_seconds,
                "exposed_seconds": each.exposed_seconds,
                "first_token_seconds": each.first_token_seconds,
                "total_seconds": each.total_seconds,
                "hidden_share": each.hidden_share,
                "kv_bytes": each.kv_bytes,
            }
            for each in routes
        },
        "rates": {
            machine.name: {
                "prefill_tokens_per_second": machine.prefill_tokens_per_second,
                "decode_tokens_per_second": machine.decode_tokens_per_second,
                "source": machine.source,
            }
            for machine in (spark, mac)
        },
    }
