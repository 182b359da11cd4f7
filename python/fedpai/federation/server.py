# SPDX-License-Identifier: Apache-2.0
"""What the server holds between rounds, and the few operations that methods build on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fedpai.federation import server_opt
from fedpai.federation.bound import ModelPool
from fedpai.federation.config import RunConfig
from fedpai.federation.feedback import move_residual, with_feedback
from fedpai.federation.layout import Floats, Ints, Layout, MaskSet, Places, pack, places, union, unpack
from fedpai.federation.payload import (
    NO_MASK,
    SCORE_DTYPES,
    SERVER,
    WIRE_DTYPES,
    DType,
    Kind,
    Payload,
    PayloadError,
    decode,
    encode,
)
from fedpai.federation.scores import restored


@dataclass
class Update:
    """What one client contributed to a round, already checked.

    Attributes:
        client, examples: who sent it and how many examples stand behind it (n_k).
        floats, ints: its model under its mask, where it sent one.
        scores: saliency per weight, where it sent them.
        mask: a new mask, where it sent one.
        thresholds: one for each output channel of the conv and linear layers, where it sent them.
    """

    client: int
    examples: int
    floats: Floats | None = None
    ints: Ints | None = None
    scores: Floats | None = None
    mask: MaskSet | None = None
    thresholds: Floats | None = None


@dataclass
class Server:
    """The server's side of a run. Methods read and replace its fields; the checkpoint saves all of them.

    Attributes:
        config, layout: the run's settings and the architecture.
        pool: builds models.
        floats, ints: the global model, packed under `mask`.
        mask: what the global model keeps (None: dense). Under personal masks, the union of them: a weight
            that no client keeps is not part of the model.
        client_masks: personal masks by client id; empty when everybody shares `mask`.
        informed: clients that already hold their mask, so that it travels once.
        round: 0 while masks are chosen, then 1, 2, ...
        extra: further arrays that a method keeps between rounds.
    """

    config: RunConfig
    layout: Layout
    pool: ModelPool
    floats: Floats
    ints: Ints
    mask: MaskSet | None = None
    client_masks: dict[int, MaskSet] = field(default_factory=dict)
    informed: set[int] = field(default_factory=set)
    round: int = 0
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    _places: dict[int, Places] = field(default_factory=dict, repr=False)
    _sent: tuple[int, Floats, bytes] | None = field(default=None, repr=False)

    # -- masks -------------------------------------------------------------------------------------------

    def set_mask(self, mask: MaskSet) -> None:
        """Gives everybody one mask. Values it does not keep are lost; weights it brings back start at 0."""
        self._repack(mask)
        self.client_masks = {}
        self.informed = set()

    def set_client_masks(self, masks: dict[int, MaskSet], *, informed: Iterable[int] = ()) -> None:
        """Gives each client its own mask; the global model keeps the union.

        Args:
            masks: by client id, at least one.
            informed: clients that chose their mask themselves and need not be told.
        """
        self._repack(union(list(masks.values())))
        self.client_masks = dict(sorted(masks.items()))
        self.informed = set(informed)

    def _repack(self, mask: MaskSet) -> None:
        dense = unpack(self.floats, self.mask, self.layout)
        self.floats = pack(dense, mask, self.layout)
        move_residual(self.extra, self.mask, mask, self.layout)
        server_opt.move_state(self, mask)
        self.mask = mask
        self._places = {}

    def mask_of(self, client: int) -> MaskSet | None:
        """The mask under which a client trains."""
        return self.client_masks.get(client, self.mask)

    def places_of(self, client: int) -> Places:
        """Where the floats of a client's message lie in the global vector."""
        known = self._places.get(client)
        if known is None:
            mask = self.mask_of(client)
            if mask is None or self.mask is None:
                known = np.arange(self.floats.size, dtype=np.int32)
            else:
                tail = np.arange(self.mask.kept, self.floats.size, dtype=np.int32)
                known = np.concatenate((places(mask, self.mask), tail))
            self._places[client] = known
        return known

    def dense(self) -> tuple[Floats, Ints]:
        """The global model as dense vectors, zeros at the pruned weights."""
        return unpack(self.floats, self.mask, self.layout), self.ints.copy()

    def model(self) -> nn.Module:
        """The global model as a separate dense torch model."""
        return self.pool.plain(*self.dense())

    def round_to_wire(self) -> None:
        """Rounds the global model to what its messages can carry; error feedback keeps the rest for the next time.

        Everybody then holds the same numbers, and rounding again without a merge in between changes nothing.

        Raises:
            PayloadError: a value that is not finite, or a weight that the run's wire format cannot hold; nothing was
                changed.
        """
        if not np.isfinite(self.floats).all():
            raise PayloadError(f"{np.count_nonzero(~np.isfinite(self.floats))} values are not finite")
        dtype = WIRE_DTYPES[self.config.wire]
        self.floats = with_feedback(self.extra, self.floats, self.layout.other_count, dtype)

    # -- messages ----------------------------------------------------------------------------------------

    def values_message(self, client: int) -> bytes:
        """The global model as this client sees it; what all see is encoded once a round."""
        if self.client_masks:
            return self._values(self.floats[self.places_of(client)], self.mask_of(client))
        if self._sent is None or self._sent[0] != self.round or self._sent[1] is not self.floats:
            self._sent = (self.round, self.floats, self._values(self.floats, self.mask))
        return self._sent[2]

    def _values(self, floats: Floats, mask: MaskSet | None) -> bytes:
        return encode(
            Kind.VALUES,
            round=self.round,
            client=SERVER,
            examples=0,
            model_digest=self.layout.digest,
            mask_digest=NO_MASK if mask is None else mask.digest,
            values=floats,
            ints=self.ints,
            dtype=WIRE_DTYPES[self.config.wire],
            exact=self.layout.other_count,
            deflate=self.config.compress == "deflate",
        )

    def mask_message(self, client: int) -> list[bytes]:
        """The client's mask, if it has one and has not been told yet; else nothing."""
        mask = self.mask_of(client)
        if mask is None or client in self.informed:
            return []
        message = encode(
            Kind.MASK,
            round=self.round,
            client=SERVER,
            examples=0,
            model_digest=self.layout.digest,
            mask_digest=mask.digest,
            bits=mask.bits(),
            count=self.layout.weight_count,
        )
        return [message]

    def thresholds_message(self, thresholds: Floats) -> bytes:
        """One threshold for each output channel, the same for every client."""
        return encode(
            Kind.THRESHOLDS,
            round=self.round,
            client=SERVER,
            examples=0,
            model_digest=self.layout.digest,
            mask_digest=NO_MASK,
            values=thresholds,
            deflate=self.config.compress == "deflate",
        )

    def read_values(self, client: int, message: bytes, mask: MaskSet | None = None) -> Update:
        """Checks a client's VALUES message against its mask and this round.

        Args:
            mask: what the values are packed under, where the client sent a new one along; else the one it trains under.

        Raises:
            PayloadError: anything that differs from what this client must send now.
        """
        mask = self.mask_of(client) if mask is None else mask
        payload = self._expect(
            client,
            message,
            Kind.VALUES,
            count=self.layout.float_count(mask),
            mask_digest=NO_MASK if mask is None else mask.digest,
            ints=self.layout.int_count,
            dtype=WIRE_DTYPES[self.config.wire],
        )
        return Update(client, payload.examples, floats=payload.values, ints=payload.ints)

    def read_scores(self, client: int, message: bytes) -> Update:
        """Checks a client's SCORES message. Raises PayloadError as `read_values` does."""
        dtype = SCORE_DTYPES[self.config.scores]
        steps = 1 if dtype is DType.INT16 else 0
        count = self.layout.weight_count + steps
        payload = self._expect(
            client, message, Kind.SCORES, count=count, mask_digest=NO_MASK, dtype=dtype, exact=steps
        )
        scores = restored(payload.values) if steps else payload.values
        return Update(client, payload.examples, scores=scores)

    def read_mask(self, client: int, message: bytes) -> Update:
        """Checks a client's MASK message. Raises PayloadError as `read_values` does."""
        payload = self._expect(client, message, Kind.MASK, count=self.layout.weight_count, mask_digest=None)
        return Update(client, payload.examples, mask=mask_from(payload, self.layout))

    def read_thresholds(self, client: int, message: bytes) -> Update:
        """Checks a client's THRESHOLDS message. Raises PayloadError as `read_values` does."""
        payload = self._expect(
            client, message, Kind.THRESHOLDS, count=self.layout.channel_count, mask_digest=NO_MASK
        )
        return Update(client, payload.examples, thresholds=payload.values)

    def _expect(
        self,
        client: int,
        message: bytes,
        kind: Kind,
        *,
        count: int,
        mask_digest: bytes | None,
        ints: int = 0,
        dtype: DType | None = None,
        exact: int | None = None,
    ) -> Payload:
        return decode(message, most=max(count, self.layout.float_count(None))).expect(
            kind=kind,
            round=self.round,
            client=client,
            model_digest=self.layout.digest,
            mask_digest=mask_digest,
            count=count,
            ints=ints,
            dtype=dtype,
            exact=self.layout.other_count if exact is None else exact,
        )


def mask_from(payload: Payload, layout: Layout) -> MaskSet:
    """The mask that a MASK message carries.

    Raises:
        PayloadError: a bitmap that does not fit the model, does not have the digest it claims, or leaves a
            layer without weights.
    """
    try:
        mask = MaskSet.from_bits(layout, payload.bits)
    except ValueError as error:
        raise PayloadError(f"payload mask: {error}") from None
    if mask.digest != payload.mask_digest:
        raise PayloadError(
            f"payload mask has digest {mask.digest.hex()[:16]}, "
            f"its header says {payload.mask_digest.hex()[:16]}"
        )
    for slot, where in mask.parts():
        if where.start == where.stop:
            raise PayloadError(f"payload mask keeps no weight of {slot.key}")
    return mask
