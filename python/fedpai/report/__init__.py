# SPDX-License-Identifier: Apache-2.0
"""From a finished run to a page, a table and machine-readable rows."""

from fedpai.report.content import Content, collect, json_rows, layer_profile, text
from fedpai.report.page import write

__all__ = ["Content", "collect", "json_rows", "layer_profile", "text", "write"]
