"""Where the model is while it is observed: whole on every node, its layers over the nodes, or one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

from sparkray.config.pruning import ObserveConfig, PlacementName
from sparkray.errors import UnavailableError, UsageError
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.layered_model import resolve_dtype
from sparkray.pruning.sizes import dense_bytes, dense_layer_bytes


def choose_placement(checkpoint: Checkpoint, config: ObserveConfig, available_bytes: Sequence[int]) -> PlacementName:
    """Settle `auto` for nodes with that much memory: the first of resident, layers and streaming that fits.

    Args:
        checkpoint: the model.
        config: `placement` and `resident_share`.
        available_bytes: memory of every node that may be used; one entry without a cluster.

    Raises:
        UnavailableError: not even one layer fits on every node.
        UsageError: `layers` was asked for and there is one node.
    """
    if config.placement == "layers" and len(available_bytes) < 2:
        raise UsageError(
            "placement `layers` spreads the model over the nodes of a cluster, and there is one node.",
            hint="Say --ray on a cluster of two or more, or take `streaming`.",
        )
    if config.placement != "auto":
        return config.placement
    itemsize = resolve_dtype(config.dtype, checkpoint).itemsize
    whole, one_layer = dense_bytes(checkpoint, itemsize)
    allowed = min(available_bytes) * config.resident_share
    if whole <= allowed:
        return "resident"
    if len(available_bytes) > 1 and _largest_part(checkpoint, itemsize, len(available_bytes)) <= allowed:
        return "layers"
    if one_layer <= allowed:
        return "streaming"
    raise UnavailableError(
        f"the largest layer takes {one_layer / 1e9:.1f} GB dense and {allowed / 1e9:.1f} GB may be used.",
        hint="Free memory, or raise resident_share.",
    )


def split_layers(sizes: Sequence[int], num_parts: int) -> list[range]:
    """Cut layers of these sizes into runs of neighbours whose largest is as small as can be.

    Args:
        sizes: bytes of the layers, in order.
        num_parts: runs; fewer come back where there are fewer layers.
    """
    num_parts = min(num_parts, len(sizes))
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle, 1)) <= num_parts:
            high = middle
        else:
            low = middle + 1
    return _filled(sizes, low, num_parts)


def layer_parts(checkpoint: Checkpoint, itemsize: int, num_parts: int) -> list[range]:
    """The layers of a model, cut into `num_parts` runs of about equal bytes."""
    return split_layers(_main_layer_bytes(checkpoint, itemsize)[1], num_parts)


def _largest_part(checkpoint: Checkpoint, itemsize: int, num_parts: int) -> int:
    outside, sizes = _main_layer_bytes(checkpoint, itemsize)
    return outside + max(sum(sizes[part.start : part.stop]) for part in split_layers(sizes, num_parts))


def _main_layer_bytes(checkpoint: Checkpoint, itemsize: int) -> tuple[int, list[int]]:
    """(bytes that every node holds, bytes of each layer of the main stack)."""
    outside, layers = dense_layer_bytes(checkpoint, itemsize)
    num_layers = int(text_config(checkpoint.config, checkpoint.family)["num_hidden_layers"])
    sizes = [0] * num_layers
    for (stack, number), num_bytes in layers.items():
        if "mtp" not in stack and number < num_layers:
            sizes[number] += num_bytes
    return outside, sizes


def _filled(sizes: Sequence[int], limit: int, num_parts: int) -> list[range]:
    """Runs that are filled up to `limit`, and at least `num_parts` of them."""
    parts: list[range] = []
    start = used = 0
    for number, size in enumerate(sizes):
        needed_after = num_parts - len(parts) - 1
        full = used + size > limit or (number > start and len(sizes) - number == needed_after)
        if full and number > start:
            parts.append(range(start, number))
            start, used = number, 0
        used += size
    parts.append(range(start, len(sizes)))
    return parts
