"""`python -m services.decode`: a decode worker process."""

from __future__ import annotations

import uvloop

from common.worker.main import worker_main
from services.decode.worker import DecodeRole

if __name__ == "__main__":
    raise SystemExit(uvloop.run(worker_main("decode", DecodeRole)))
