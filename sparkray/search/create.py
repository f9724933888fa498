"""How settings choose a policy."""

from __future__ import annotations

from pathlib import Path

from sparkray.config.search import SearchConfig
from sparkray.errors import InputError
from sparkray.search.policies import (
    AdaptiveConsistency,
    DeepConfOffline,
    DeepConfOnline,
    EarlyStopping,
    Full,
    Metis,
    Policy,
)
from sparkray.search.profile import SearchProfile, load_profile, packaged_profile

PACKAGED = "packaged"
"""As `profile` in the settings: the one that ships for the model."""


def open_profile(config: SearchConfig, model: str) -> SearchProfile | None:
    """The profile that the settings name, checked against the model and the settings; None where they name none.

    Raises:
        InputError: made for another model, temperature or task, or the paths' temperatures are spread.
        NotFoundError: no such file.
    """
    if config.profile is None:
        return None
    profile = load_profile(packaged_profile(model) if config.profile == PACKAGED else Path(config.profile))
    profile.check(model, config.temperature, config.task)
    if config.temperature_spread:
        raise InputError(
            f"temperature_spread is {config.temperature_spread:g}, and a profile holds for one temperature.",
            hint="Leave temperature_spread at 0, or use another policy than 'certified'.",
            param="temperature_spread",
        )
    return profile


def create_policy(config: SearchConfig, profile: SearchProfile | None = None) -> Policy:
    """The policy that the settings name, with its knobs.

    Args:
        config: the settings.
        profile: needed by `certified`, and checked against model and temperature by the caller.

    Raises:
        InputError: `certified` without a profile.
    """
    match config.policy:
        case "certified":
            if profile is None:
                raise InputError("the policy 'certified' needs a calibrated profile.", param="profile")
            return profile.policy(config.alpha, config.risk, config.wave, config.task)
        case "adaptive_consistency":
            return AdaptiveConsistency(config.certainty, config.wave)
        case "esc":
            return EarlyStopping(config.window)
        case "deepconf_offline":
            return DeepConfOffline(config.keep, config.group_tokens)
        case "deepconf_online":
            return DeepConfOnline(config.warm_up, config.keep, config.certainty, config.group_tokens, config.wave)
        case "metis":
            return Metis(**config.metis.model_dump())
        case "full":
            return Full()
