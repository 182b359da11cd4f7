# SPDX-License-Identifier: Apache-2.0
"""What a user can ask for that cannot be measured."""


class BenchError(ValueError):
    """An unknown name, a value out of range, or a file that cannot be read; one line says which."""
