# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles is kept with what pytest keeps, in the checkout instead of in the home folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _compiled_kernels(pytestconfig: pytest.Config) -> Iterator[None]:
    cache = getattr(pytestconfig, "cache", None)  # none under `-p no:cacheprovider`
    with pytest.MonkeyPatch.context() as patch:
        if cache is not None and "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(cache.mkdir("triton")))
        yield
