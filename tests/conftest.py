"""What every test shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test asserts on time, so neither does hypothesis: on a busy machine its deadline fails at random.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
