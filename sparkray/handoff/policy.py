"""Which way a request goes: the cheapest route by prediction, with a margin, from rates that are learned as it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparkray.config.handoff import LinkRates, MachineRates, ModelShape, RouteConfig, RouteName
from sparkray.handoff.plan import RouteTimes, Work, alone_times, handoff_times


@dataclass(frozen=True, slots=True)
class Sides:
    """What is known of both sides when a request comes.

    Attributes:
        shape: the model.
        prefill: the prefill side's rates; None: it is not reachable.
        decode: the decode side's rates; None: it is not reachable.
        link: between them; None: there is none.
        coded_share: bytes on the wire over plain bytes.
        context_tokens: longest sequence of the decode side.
    """

    shape: ModelShape
    prefill: MachineRates | None
    decode: MachineRates | None
    link: LinkRates | None
    coded_share: float = 1.0
    context_tokens: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Decision:
    """The route, why, and what each was predicted to take."""

    route: RouteName | None
    reason: str
    times: Mapping[str, RouteTimes] = field(default_factory=dict)


def choose_route(sides: Sides, work: Work, config: RouteConfig, current: RouteName | None = None) -> Decision:
    """The route of least total time that is open.

    A handoff must beat the best other route by `min_gain_seconds` and `min_gain_share`: it has more parts that can
    fail. A conversation that runs on `current` leaves it only for a gain of `hysteresis_share`, since its rows lie
    there. No route at all is a decision too: `route` is None.
    """
    times: dict[str, RouteTimes] = {}
    closed = []
    fits = work.prompt_tokens + work.output_tokens <= sides.context_tokens
    if sides.prefill is not None:
        times["prefill_node"] = alone_times("prefill_node", sides.prefill, work)
    if sides.decode is not None and fits:
        times["decode_node"] = alone_times("decode_node", sides.decode, work)
    if sides.prefill is None or sides.decode is None or sides.link is None:
        closed.append("a side is not reachable")
    elif not fits:
        closed.append(
            f"{work.prompt_tokens + work.output_tokens} tokens exceed the decode side's {sides.context_tokens}"
        )
    else:
        handed = handoff_times(sides.shape, sides.prefill, sides.decode, sides.link, work, sides.coded_share)
        if handed.kv_bytes > config.max_kv_bytes:
            closed.append(f"{handed.kv_bytes:.0f} bytes exceed the limit of {config.max_kv_bytes}")
        else:
            times["handoff"] = handed
    if not times:
        return Decision(None, "; ".join(closed), times)
    best = min(times.values(), key=lambda each: each.total_seconds)
    if best.route == "handoff" and len(times) > 1:
        other = min((t for t in times.values() if t.route != "handoff"), key=lambda each: each.total_seconds)
        gain = other.total_seconds - best.total_seconds
        if gain < max(config.min_gain_seconds, config.min_gain_share * other.total_seconds):
            closed.append(f"a handoff would gain {gain:.3f} s only")
            best = other
    if current in times and current != best.route:
        held = times[current]
        if held.total_seconds - best.total_seconds < config.hysteresis_share * held.total_seconds:
            return Decision(held.route, "the conversation stays where its rows are", times)
    reason = "; ".join(closed) if closed and best.route != "handoff" else "least predicted total time"
    return Decision(best.route, reason, times)


class LearnedRate:
    """A rate from observations, one exponential mean for each doubling of the amount.

    Short prompts never reach the rate of long ones, so they do not share a mean. Buckets: 1, 2-3, 4-7, ... up to 2^31.
    """

    def __init__(self, initial: float, weight: float = 0.3) -> None:
        self._initial = initial
        self._weight = weight
        self._means: dict[int, float] = {}

    def observe(self, amount: float, seconds: float) -> None:
        """An amount of work that took so long; nothing is learned from empty work or time."""
        if amount <= 0 or seconds <= 0:
            return
        bucket, rate = _bucket(amount), amount / seconds
        known = self._means.get(bucket)
        self._means[bucket] = rate if known is None else known + self._weight * (rate - known)

    def rate(self, amount: float) -> float:
        """The mean of the amount's bucket, or of the nearest one that has seen anything, or the first guess."""
        if not self._means:
            return self._initial
        bucket = _bucket(amount)
        return self._means[min(self._means, key=lambda known: (abs(known - bucket), known))]


def _bucket(amount: float) -> int:
    return min(31, max(0, int(amount).bit_length() - 1))
