# SPDX-License-Identifier: Apache-2.0
"""The federated loop: payloads, masked aggregation, clients, server, run folder.

`fedpai.federation.runner` is the way in; `docs/federation.md` has the formulas. Nothing is imported here: the
command line reads `config` before it is known whether torch works.
"""
