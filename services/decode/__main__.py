"""`python -m services.decode`: a decode worker process."""

from __future__ import annotations

from common.worker.main import worker_main
from services.decode.worker import DecodeRole

if __name__ == "__main__":
    worker_main("decode", DecodeRole)
