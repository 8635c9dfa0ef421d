"""`python -m services.kvstore`: a KV store process."""

from __future__ import annotations

import uvloop

from common.config import load_config
from common.memory import keep_large_frames
from common.net.access import Access
from common.service import serve
from services.kvstore.config import StoreConfig
from services.kvstore.service import KvStore

if __name__ == "__main__":
    keep_large_frames()
    config = load_config(StoreConfig, "kvstore")
    binds = [config.bind, config.data_bind]
    access = Access("kvstore", config.keys, config.insecure, binds)
    main = serve(
        config.name,
        config.log_level,
        access,
        lambda seams: KvStore(config, seams),
        io_threads=config.io_threads,
    )
    raise SystemExit(uvloop.run(main))
