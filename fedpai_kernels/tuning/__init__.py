# SPDX-License-Identifier: Apache-2.0
"""What the choice between kernels rests on: figures that come with the package, or measured on this machine.

Reading them is here; measuring them is :mod:`fedpai_kernels.tuning.measure`, which nothing but
:func:`fedpai_kernels.tune` calls.
"""

from .figures import BUILT_IN, BreakEvens
from .file import State, TuningError, break_evens, default_path, read, state, write
from .machine import cpu_model, facts

__all__ = [
    "BUILT_IN",
    "BreakEvens",
    "State",
    "TuningError",
    "break_evens",
    "cpu_model",
    "default_path",
    "facts",
    "read",
    "state",
    "write",
]
