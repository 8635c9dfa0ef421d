"""`python -m services.prefill`: a prefill worker process."""

from __future__ import annotations

from common.worker.main import worker_main
from services.prefill.worker import PrefillRole

if __name__ == "__main__":
    worker_main("prefill", PrefillRole)
