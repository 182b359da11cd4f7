# SPDX-License-Identifier: Apache-2.0
"""The kernels, one operation a file. Importing one of these modules takes Triton; nothing else of the package does."""
