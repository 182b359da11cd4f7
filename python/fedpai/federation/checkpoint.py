# SPDX-License-Identifier: Apache-2.0
"""Everything a method needs to go on, as one safetensors buffer.

Tensors: the global model's packed floats and its integer buffers, every mask once (positions, by digest),
and the arrays that methods keep on the server or on a client. Metadata: one JSON object that says which
mask belongs to whom, with the digests that the content must have. There is no generator state to save:
every random draw is derived from the seed and its place in the run (see `seeds`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpai.federation.bound import ModelPool
from fedpai.federation.client import ClientMemory
from fedpai.federation.config import RunConfig, differences
from fedpai.federation.layout import LayoutError, MaskSet
from fedpai.federation.server import Server

FORMAT = "fedpai checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another model, mask or method."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint brings back."""

    server: Server
    memories: dict[int, ClientMemory]


def dump(method: str, server: Server, memories: Mapping[int, ClientMemory]) -> bytes:
    """The state of one method between two rounds."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {"server.floats": server.floats, "server.ints": server.ints}
    masks: dict[str, MaskSet] = {}

    def name_of(mask: MaskSet | None) -> str | None:
        if mask is None:
            return None
        masks[mask.digest.hex()] = mask
        return mask.digest.hex()

    about: dict[str, Any] = {
        "format": FORMAT,
        "method": method,
        "config": server.config.to_json(),
        "model": server.layout.digest.hex(),
        "round": server.round,
        "mask": name_of(server.mask),
        "client_masks": {str(client): name_of(mask) for client, mask in server.client_masks.items()},
        "memories": {str(client): name_of(memory.mask) for client, memory in memories.items()},
        "informed": sorted(server.informed),
    }
    for key, array in server.extra.items():
        tensors[f"server.extra.{key}"] = array
    for client, memory in memories.items():
        for key, array in memory.extra.items():
            tensors[f"client.{client}.extra.{key}"] = array
    for digest, mask in masks.items():
        tensors[f"mask.{digest}"] = mask.positions
    about["content"] = _content_digest(tensors)
    ordered = {key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}
    return save(ordered, metadata={"fedpai": json.dumps(about, sort_keys=True)})


def load(data: bytes, method: str, config: RunConfig, pool: ModelPool) -> Restored:
    """Reads what `dump` wrote.

    Raises:
        CheckpointError: damaged content, another format, method or model, or a mask that is not the one
            whose digest is recorded.
    """
    layout = pool.layout
    about, tensors = _open(data)
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"not a checkpoint of this version: {about.get('format')!r}, expected {FORMAT!r}"
        )
    if about.get("content") != _content_digest(tensors):
        raise CheckpointError("the checkpoint is damaged: its content does not have the recorded digest")
    if about["method"] != method:
        raise CheckpointError(f"the checkpoint is of method {about['method']}, expected {method}")
    if about["model"] != layout.digest.hex():
        raise CheckpointError(
            f"the checkpoint is of another model: digest {about['model'][:16]}, "
            f"expected {layout.digest.hex()[:16]}"
        )
    different = differences(config.to_json(), about["config"])
    if different:
        raise CheckpointError(
            "the checkpoint is of a run with another configuration: " + "; ".join(different)
        )
    masks: dict[str, MaskSet] = {}
    for key, array in tensors.items():
        if not key.startswith("mask."):
            continue
        digest = key.removeprefix("mask.")
        try:
            masks[digest] = MaskSet.from_positions(layout, array)
        except LayoutError as error:
            raise CheckpointError(f"the checkpoint's mask does not fit the model: {error}") from None
        if masks[digest].digest.hex() != digest:
            raise CheckpointError(
                f"the checkpoint is of another mask: digest {masks[digest].digest.hex()[:16]}, "
                f"recorded {digest[:16]}"
            )
    return _assemble(about, tensors, masks, config, pool)


def _assemble(
    about: dict[str, Any],
    tensors: dict[str, np.ndarray],
    masks: dict[str, MaskSet],
    config: RunConfig,
    pool: ModelPool,
) -> Restored:
    def mask_of(digest: str | None) -> MaskSet | None:
        return None if digest is None else masks[digest]

    def extra(prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    try:
        server = Server(
            config,
            pool.layout,
            pool,
            tensors["server.floats"],
            tensors["server.ints"],
            mask=mask_of(about["mask"]),
            client_masks={int(client): masks[digest] for client, digest in about["client_masks"].items()},
            informed=set(about["informed"]),
            round=about["round"],
            extra=extra("server.extra."),
        )
        memories = {
            int(client): ClientMemory(mask_of(digest), extra(f"client.{client}.extra."))
            for client, digest in about["memories"].items()
        }
        pool.layout.check(server.floats, server.ints, server.mask)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is incomplete or does not fit: {error}") from None
    return Restored(server, memories)


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        tensors = {key: array.copy() for key, array in load_tensors(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["fedpai"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint is damaged or not one of this program: {error}") from None
    if not isinstance(about, dict):
        raise CheckpointError("the checkpoint is damaged: its description is not an object")
    return about, tensors


def _content_digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        array = np.ascontiguousarray(tensors[key])
        digest.update(repr((key, array.dtype.str, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
