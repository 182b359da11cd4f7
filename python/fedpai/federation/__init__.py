# SPDX-License-Identifier: Apache-2.0
"""The federated loop: payloads, masked aggregation, clients, server, run folder.

`fedpai.federation.runner` is the way in; `docs/federation.md` has the formulas.
"""

from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.payload import PayloadError

__all__ = ["ConfigError", "PayloadError", "RunConfig"]
