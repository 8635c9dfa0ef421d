"""`python -m services.gateway`: a gateway process."""

from __future__ import annotations

import uvloop

from common.config import load_config
from common.net.access import Access
from common.service import serve
from services.gateway.config import GatewayConfig
from services.gateway.service import Gateway

if __name__ == "__main__":
    config = load_config(GatewayConfig, "gateway")
    access = Access("gateway", config.keys, config.insecure, [config.bind])
    main = serve(
        config.name,
        config.log_level,
        access,
        lambda seams: Gateway(config, seams),
        config.drain_s,
    )
    raise SystemExit(uvloop.run(main))
