# SPDX-License-Identifier: Apache-2.0
"""Federated learning with networks that are pruned before training starts.

Sub-packages: ``models`` (networks), ``data`` (images and partitions), ``pruning`` (which weights to keep),
``methods`` and ``federation`` (the training loop), ``report`` and ``cli`` (results and the command line).
Speed comes from the package ``fedpai_kernels``, which never imports this one.
"""

__version__ = "0.1.0"
