# SPDX-License-Identifier: Apache-2.0
"""Measurements against rivals: single layers and whole training steps.

``fedpai bench layers`` and ``fedpai bench step`` are in :mod:`fedpai.bench.cli`; the suites in ``benchmarks/``
use the same modules. How numbers are made is written in ``docs/benchmarking.md``.
"""

from fedpai.bench.errors import BenchError

__all__ = ["BenchError"]
