# SPDX-License-Identifier: Apache-2.0
"""The torch library that all ops are registered in."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fedpai", "DEF")
