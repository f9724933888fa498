"""Watching a model think.

While a model writes, the entropy of the distribution that each token is drawn from says how sure it is. `entropy`
takes it from the logits of a whole batch in one pass; `rules` and `detectors` turn it into alarms, by the rule that
METIS published or by one whose false-alarm rate is chosen; `boost` nudges an unsure model to think again; `trace`
and `reward` tell afterwards how an answer came about. `vllm_processor` puts all this into vLLM, where a request
asks for it by the flat keys that `options` reads.

Nothing is imported until it is named: the names below that need no torch can be used without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkray.metis.boost import BoostTable, apply_boost
    from sparkray.metis.calibration import fit_profile
    from sparkray.metis.compat import CoTBoostProcessor, MetisCompositeProcessor, MetisCUSUMProcessor
    from sparkray.metis.detectors import DetectorBank
    from sparkray.metis.entropy import EntropyStats, entropy_stats
    from sparkray.metis.fields import TOKEN_FIELDS, Action
    from sparkray.metis.options import WatchOptions, parse_xargs
    from sparkray.metis.profile import ProfileStore, ReferenceProfile
    from sparkray.metis.reward import CognitiveReward, CognitiveRewardComputer, RewardWeights
    from sparkray.metis.trace import CognitiveEvent, CognitiveTrace, TraceBuilder

_HOME = {
    "Action": "fields",
    "BoostTable": "boost",
    "CoTBoostProcessor": "compat",
    "CognitiveEvent": "trace",
    "CognitiveReward": "reward",
    "CognitiveRewardComputer": "reward",
    "CognitiveTrace": "trace",
    "DetectorBank": "detectors",
    "EntropyStats": "entropy",
    "MetisCUSUMProcessor": "compat",
    "MetisCompositeProcessor": "compat",
    "ProfileStore": "profile",
    "ReferenceProfile": "profile",
    "RewardWeights": "reward",
    "TOKEN_FIELDS": "fields",
    "TraceBuilder": "trace",
    "WatchOptions": "options",
    "apply_boost": "boost",
    "entropy_stats": "entropy",
    "fit_profile": "calibration",
    "parse_xargs": "options",
}

__all__ = [
    "TOKEN_FIELDS",
    "Action",
    "BoostTable",
    "CoTBoostProcessor",
    "CognitiveEvent",
    "CognitiveReward",
    "CognitiveRewardComputer",
    "CognitiveTrace",
    "DetectorBank",
    "EntropyStats",
    "MetisCUSUMProcessor",
    "MetisCompositeProcessor",
    "ProfileStore",
    "ReferenceProfile",
    "RewardWeights",
    "TraceBuilder",
    "WatchOptions",
    "apply_boost",
    "entropy_stats",
    "fit_profile",
    "parse_xargs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
