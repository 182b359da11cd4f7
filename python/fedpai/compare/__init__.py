# SPDX-License-Identifier: Apache-2.0
"""`fedpai compare`: a grid of runs, one after the other, and one report on all of them (docs/compare.md)."""
