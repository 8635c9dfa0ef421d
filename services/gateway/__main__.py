"""`python -m services.gateway`: a gateway process."""

from __future__ import annotations

import uvloop

from common.config import load_config
from common.service import serve
from services.gateway.service import Gateway, GatewayConfig

if __name__ == "__main__":
    config = load_config(GatewayConfig, "python -m services.gateway")
    main = serve(config.name, config.log_level, lambda seams: Gateway(config, seams))
    raise SystemExit(uvloop.run(main))
