"""The profiles that come with the package: whole, of the embedded model, and found for the requests it gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparkray.errors import NotFoundError
from sparkray.metis.batch_input import read_prompts
from sparkray.metis.calibration import count_alarms
from sparkray.metis.profile import ProfileStore
from sparkray.models import resolve_model

STORE = ProfileStore()
PROMPTS = Path(__file__).parents[2] / "configs" / "metis" / "reference_prompts.jsonl"


@pytest.mark.parametrize("name", STORE.names())
def test_a_packaged_profile_is_sound(name: str) -> None:
    profile = STORE.load(name)
    assert profile.name == name
    assert 150 <= profile.num_streams <= len(read_prompts(PROMPTS))
    assert profile.num_tokens > 10_000
    arl, hedge, refuse = np.asarray(profile.table).T
    assert (np.diff(arl) > 0).all()
    assert (np.diff(hedge) > 0).all()
    assert (np.diff(refuse) > 0).all()
    # Entropies of its own mean are no news, and a lasting doubling of them is.
    calm, doubled = (np.full(400, factor * profile.mean_bits) for factor in (1.0, 2.0))
    assert count_alarms(profile, [calm], 1_000).num_hedge == 0
    assert count_alarms(profile, [doubled], 1_000).num_hedge >= 1


@pytest.mark.parametrize(
    ("temperature", "fitting"), [(0.0, 0.0), (0.1, 0.0), (0.6, 0.7), (0.7, 0.7), (0.8, 0.7), (0.9, 1.0), (1.0, 1.0)]
)
def test_the_embedded_model_has_one_for_usual_temperatures(temperature: float, fitting: float) -> None:
    """By the folder that the engine loads, which is how a request without `metis_profile` finds its own."""
    found = STORE.find(resolve_model("embedded").path_or_id, temperature)
    assert found.name == f"smollm2-135m-instruct/t{fitting:g}/chat"


def test_a_temperature_in_between_says_what_there_is() -> None:
    with pytest.raises(NotFoundError, match=r"smollm2-135m-instruct/t0\.7/chat"):
        STORE.find("embedded/SmolLM2-135M-Instruct", 0.4)
