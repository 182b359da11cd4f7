# SPDX-License-Identifier: Apache-2.0
"""Federated methods by name."""

from __future__ import annotations

from fedpai.federation.config import RunConfig, one_of
from fedpai.methods.base import Method
from fedpai.methods.fedavg import FedAvg
from fedpai.methods.feddst import FedDST
from fedpai.methods.fedpai_s import FedPaiS
from fedpai.methods.fedpai_u import FedPaiU
from fedpai.methods.fedprox import FedProx
from fedpai.methods.fedsparsify_global import FedSparsifyGlobal
from fedpai.methods.fedsparsify_local import FedSparsifyLocal
from fedpai.methods.local import Local
from fedpai.methods.magnitude import Magnitude
from fedpai.methods.random import Random
from fedpai.methods.spafl import SpaFL
from fedpai.methods.ssfl import SSFL

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FedAvg,
        FedDST,
        FedPaiS,
        FedPaiU,
        FedProx,
        FedSparsifyGlobal,
        FedSparsifyLocal,
        Local,
        Magnitude,
        Random,
        SpaFL,
        SSFL,
    )
}
"""Every method there is. Adding one is adding it here."""


def names() -> list[str]:
    """Registered method names, sorted."""
    return sorted(METHODS)


def create(name: str, config: RunConfig) -> Method:
    """The method of that name for a run.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    one_of("method", name, names())
    return METHODS[name](config)
