"""What all tests share: quiet logs, and compute threads that do not spin."""

from __future__ import annotations

import os

import structlog

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
# Warnings and errors are shown with a test that fails; the rest costs time.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
