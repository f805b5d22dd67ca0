"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test depends on time; the default run tries the same examples everywhere, the slow tier searches on.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")
