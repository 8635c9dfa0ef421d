"""What all tests share: quiet logs."""

from __future__ import annotations

import structlog

# Warnings and errors are shown with a test that fails; the rest costs time.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
