# SPDX-License-Identifier: Apache-2.0
"""One client's turn: what it was sent, its images, its local training, what it sends back.

`Client` lives for one turn. What a client keeps between turns (its mask, a method's own arrays) is its
`ClientMemory`, which an engine stores wherever that client runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedpai.data import Dataset
from fedpai.federation.bound import BoundModel, ModelPool
from fedpai.federation.config import RunConfig
from fedpai.federation.feedback import move_residual, with_feedback
from fedpai.federation.layout import Floats, Ints, Layout, MaskSet, repack, unpack
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
from fedpai.federation.scores import coarse
from fedpai.federation.seeds import derive, generator, torch_seed
from fedpai.federation.server import mask_from
from fedpai.pruning.allocation import kept_count
from fedpai_kernels import optim

Loss = Callable[[Tensor, Tensor], Tensor]

TAKES = ((Kind.VALUES,), (Kind.MASK, Kind.VALUES))
"""What a client may be sent in its turn under most methods: a model, after the mask that it is packed under."""
MOMENTUM = "momentum"
"""Where a client's memory keeps SGD's momentum between its turns, packed under its mask."""


class ClientError(RuntimeError):
    """A client that cannot be reached or cannot do its part. The round goes on without it."""


@dataclass
class ClientMemory:
    """What one client keeps between its turns."""

    mask: MaskSet | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class TrainingLog:
    """What local training measured.

    Attributes:
        seconds: wall-clock of the training steps (forward, loss, backward, optimiser), nothing else.
        step_ms: one entry for each step of a full batch.
        steps, images: all of them, short batches included.
        loss: sum over images of the training loss.
    """

    seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    loss: float = 0.0


@dataclass
class Client:
    """One client during one turn.

    Attributes:
        id, round: who and when; round 0 is the turn before training.
        config, layout: the run's settings and the architecture.
        data, indices: the data set, and which of its training examples are the client's.
        memory: what it kept from earlier turns.
        pool: builds models.
        on_step: told (step, steps) as training goes on.
        log: filled by `fit`.
        floats, ints: its current model, dense or packed under its mask; None before any was received.
        thresholds: as the server sent them, where the method has any.
    """

    id: int
    round: int
    config: RunConfig
    layout: Layout
    data: Dataset
    indices: np.ndarray
    memory: ClientMemory
    pool: ModelPool
    on_step: Callable[[int, int], None] = lambda step, steps: None
    log: TrainingLog = field(default_factory=TrainingLog)
    floats: Floats | None = None
    ints: Ints | None = None
    thresholds: Floats | None = None

    @property
    def examples(self) -> int:
        """n_k."""
        return int(self.indices.size)

    # -- messages ----------------------------------------------------------------------------------------

    def receive(self, messages: list[bytes], takes: Collection[tuple[Kind, ...]] = TAKES) -> None:
        """Takes in what the server sent: a mask, where it is new, then the model under it; or thresholds.

        Nothing at all may be sent; whoever needs something says so later.

        Args:
            takes: the kinds that the method sends, one after the other.

        Raises:
            PayloadError: a message that is damaged, stale or for another model, or other messages than the method
                sends; nothing was changed by any of them.
        """
        payloads = [decode(message, most=self.layout.float_count(None)) for message in messages]
        kinds = tuple(payload.kind for payload in payloads)
        if kinds and kinds not in takes:
            raise PayloadError(f"expected {' or '.join(map(_names, takes))}, got {_names(kinds)}")
        mask = self.memory.mask
        for payload in payloads:
            if payload.kind is Kind.MASK:
                self._expect(payload, Kind.MASK, self.layout.weight_count, None, 0)
                mask = mask_from(payload, self.layout)
            elif payload.kind is Kind.THRESHOLDS:
                self._expect(payload, Kind.THRESHOLDS, self.layout.channel_count, NO_MASK, 0)
            else:
                count, digest = self.layout.float_count(mask), NO_MASK if mask is None else mask.digest
                self._expect(payload, Kind.VALUES, count, digest, self.layout.int_count)
        for payload in payloads:
            if payload.kind is Kind.THRESHOLDS:
                self.thresholds = payload.values
            elif payload.kind is Kind.VALUES:
                self.floats, self.ints = payload.values, payload.ints
        if mask is not None and mask is not self.memory.mask:
            self.set_mask(mask)

    def _expect(self, payload: Payload, kind: Kind, count: int, mask_digest: bytes | None, ints: int) -> None:
        payload.expect(
            kind=kind,
            round=self.round,
            client=SERVER,
            model_digest=self.layout.digest,
            mask_digest=mask_digest,
            count=count,
            ints=ints,
            dtype=WIRE_DTYPES[self.config.wire] if kind is Kind.VALUES else None,
            exact=self.layout.other_count,
        )

    def values_message(self, mask: MaskSet | None = None) -> bytes:
        """The client's model, rounded with error feedback to the run's wire format.

        Args:
            mask: what to pack under, where the client sends a new mask along; else the one it trains under.

        Raises:
            PayloadError: a weight that the format cannot hold.
        """
        floats, ints = self.model_vectors()
        dtype, own = WIRE_DTYPES[self.config.wire], self.memory.mask
        sent = with_feedback(self.memory.extra, floats, self.layout.other_count, dtype)
        if mask is None:
            mask = own
        else:
            sent = repack(sent, own, mask, self.layout)
        return self._encode(Kind.VALUES, mask, values=sent, ints=ints, dtype=dtype)

    def scores_message(self, scores: Floats) -> bytes:
        """One score for each conv and linear weight, as the run's setting `scores` has them travel."""
        dtype = SCORE_DTYPES[self.config.scores]
        if dtype is DType.INT16:
            scores = coarse(scores, kept_count(scores.size, self.config.sparsity))
        return self._encode(Kind.SCORES, None, values=scores, dtype=dtype, exact=1)

    def thresholds_message(self, thresholds: Floats) -> bytes:
        """One threshold for each output channel of the conv and linear layers."""
        return self._encode(Kind.THRESHOLDS, None, values=thresholds)

    def mask_message(self, mask: MaskSet) -> bytes:
        """A mask that this client chose."""
        return self._encode(Kind.MASK, mask, bits=mask.bits(), count=self.layout.weight_count)

    def _encode(
        self,
        kind: Kind,
        mask: MaskSet | None,
        *,
        values: Floats | None = None,
        ints: Ints | None = None,
        bits: bytes = b"",
        count: int | None = None,
        dtype: DType = DType.FLOAT32,
        exact: int | None = None,
    ) -> bytes:
        return encode(
            kind,
            round=self.round,
            client=self.id,
            examples=self.examples,
            model_digest=self.layout.digest,
            mask_digest=NO_MASK if mask is None else mask.digest,
            values=values,
            ints=ints,
            bits=bits,
            count=count,
            dtype=dtype,
            exact=self.layout.other_count if exact is None else exact,
            deflate=self.config.compress == "deflate" or dtype is DType.INT16,
        )

    # -- the model ---------------------------------------------------------------------------------------

    def model_vectors(self) -> tuple[Floats, Ints]:
        """The client's current model as packed vectors.

        Raises:
            PayloadError: the server has sent no model in this turn.
        """
        if self.floats is None or self.ints is None:
            raise PayloadError(f"client {self.id} was sent no model in round {self.round}")
        return self.floats, self.ints

    def bound(self) -> BoundModel:
        """A trainable model that holds the client's values; pass it to `keep` after changing it."""
        bound = self.pool.get(self.memory.mask)
        bound.load(*self.model_vectors())
        return bound

    def model(self) -> nn.Module:
        """The client's values in a separate dense torch model, for scoring."""
        floats, ints = self.model_vectors()
        return self.pool.plain(unpack(floats, self.memory.mask, self.layout), ints)

    def keep(self, bound: BoundModel) -> None:
        """Takes the model's values as the client's own."""
        self.floats, self.ints = bound.read()

    def calibrate(self) -> None:
        """Takes the running statistics of the norms anew, from one pass over the client's images; nothing is trained.

        Each becomes the mean over the batches. Statistics that were merged over clients with other masks are those of
        other networks; under its own mask, a client's model is worth nothing with them (docs/methods/fedpai.md).

        Raises:
            PayloadError: the server has sent no model in this turn.
        """
        bound = self.bound()
        norms = [m for m in bound.model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        if self.examples < 2 or not norms:
            return  # batch norm needs two images
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches since then
        try:
            model = bound.model.train()
            with torch.no_grad():
                for indices in self._batches(1):
                    model(self.pool.images(bound, self.data.batch(indices, split="train")[0]))
        finally:
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum
        self.keep(bound)

    def density(self) -> float:
        """Share of the conv and linear weights that are not zero."""
        floats, _ = self.model_vectors()
        kept = self.layout.weight_count if self.memory.mask is None else self.memory.mask.kept
        return int(np.count_nonzero(floats[:kept])) / self.layout.weight_count

    def remask(self, mask: MaskSet) -> None:
        """Trains under another mask from now on: values it drops are lost, weights it brings back start at 0."""
        floats, _ = self.model_vectors()
        self.floats = repack(floats, self.memory.mask, mask, self.layout)
        self.set_mask(mask)

    def set_mask(self, mask: MaskSet) -> None:
        """Remembers another mask, and takes along momentum and error feedback of the weights that it keeps."""
        kept = self.memory.extra
        if MOMENTUM in kept:
            kept[MOMENTUM] = repack(kept[MOMENTUM], self.memory.mask, mask, self.layout)
        move_residual(kept, self.memory.mask, mask, self.layout)
        self.memory.mask = mask

    def seed(self, purpose: str) -> int:
        """A seed of this client in this round."""
        return derive(self.config.seed, purpose, self.round, self.id)

    def fit(
        self,
        loss: Loss = nn.functional.cross_entropy,
        *,
        epochs: int | None = None,
        adjust: Callable[[BoundModel], None] | None = None,
        carry_momentum: bool = False,
    ) -> None:
        """Local training: SGD with momentum and weight decay, shuffled batches.

        Fills `log`; only the training steps are timed, not the making of batches.

        Args:
            loss: of (outputs, labels).
            epochs: passes over the client's images; by default the run's.
            adjust: called after each backward pass, before the optimiser's step, to change gradients in place.
            carry_momentum: go on with the momentum of the client's last turn, less that of weights dropped since;
                by default the optimiser is fresh.
        """
        config = self.config
        bound = self.bound()
        model = bound.model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        # The dense network, the baseline of every comparison, is stepped by torch's fastest form.
        sgd = partial(torch.optim.SGD, fused=True) if bound.mask is None else optim.SGD
        optimiser = sgd(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        if carry_momentum and MOMENTUM in self.memory.extra:
            bound.load_momentum(optimiser, self.memory.extra[MOMENTUM])
        batches = list(self._batches(config.local_epochs if epochs is None else epochs))
        with torch_seed(config.seed, "train", self.round, self.id):
            for number, batch in enumerate(batches):
                x, y = self.data.batch(batch)
                x = self.pool.images(bound, x)
                start = time.perf_counter()
                optimiser.zero_grad(set_to_none=True)
                value = loss(model(x), y)
                value.backward()
                if adjust is not None:
                    adjust(bound)
                optimiser.step()
                seconds = time.perf_counter() - start
                self._record(seconds, float(value.detach()), len(batch))
                self.on_step(number + 1, len(batches))
        self.keep(bound)
        if carry_momentum:
            self._keep_momentum(bound.read_momentum(optimiser))

    def _keep_momentum(self, momentum: Floats) -> None:
        """Momentum that ran away is forgotten: with it, the client's next turn would fail like this one."""
        if np.isfinite(momentum).all():
            self.memory.extra[MOMENTUM] = momentum
        else:
            self.memory.extra.pop(MOMENTUM, None)

    def _record(self, seconds: float, loss: float, images: int) -> None:
        self.log.seconds += seconds
        self.log.steps += 1
        self.log.images += images
        self.log.loss += loss * images if math.isfinite(loss) else math.nan
        if images == self.config.batch:
            self.log.step_ms.append(1e3 * seconds)

    def _batches(self, epochs: int) -> Iterator[np.ndarray]:
        """Shuffled batches; a last batch of one image joins its neighbour (batch norm needs two)."""
        size = self.config.batch
        for epoch in range(epochs):
            order = generator(self.config.seed, "batches", self.round, self.id, epoch).permutation(
                self.indices
            )
            cuts = list(range(size, order.size, size))
            if cuts and order.size - cuts[-1] == 1:
                cuts.pop()
            yield from np.split(order, cuts)


def _names(kinds: Iterable[Kind]) -> str:
    return " and ".join(kind.name for kind in kinds)
