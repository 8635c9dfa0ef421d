"""What all tests share: quiet logs, compute threads that do not spin, no verdict by the clock."""

from __future__ import annotations

import os

import structlog
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
# Warnings and errors are shown with a test that fails; the rest costs time.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
# A machine that is busy with other things for a moment would fail tests that Hypothesis times.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
