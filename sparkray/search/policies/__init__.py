"""The policies that a search may be run under."""

from __future__ import annotations

from sparkray.search.policies.adaptive_consistency import AdaptiveConsistency
from sparkray.search.policies.base import CONTINUE, Policy, PolicyRun, StepDecision
from sparkray.search.policies.certified import Certified
from sparkray.search.policies.deepconf import DeepConfOffline, DeepConfOnline
from sparkray.search.policies.esc import EarlyStopping
from sparkray.search.policies.full import Full
from sparkray.search.policies.metis import Metis

__all__ = [
    "CONTINUE",
    "AdaptiveConsistency",
    "Certified",
    "DeepConfOffline",
    "DeepConfOnline",
    "EarlyStopping",
    "Full",
    "Metis",
    "Policy",
    "PolicyRun",
    "StepDecision",
]
