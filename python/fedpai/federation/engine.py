# SPDX-License-Identifier: Apache-2.0
"""The loop: sample clients, send, let them train, check what comes back, merge, evaluate, write a row.

`Federation` is the server's program. It reaches clients only through a `Link`, with bytes. `LocalClients`
is the link to clients that live in this process and take turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from fedpai.data import Dataset
from fedpai.federation.bound import ModelPool
from fedpai.federation.client import Client, ClientError, ClientMemory, TrainingLog
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.evaluate import Evaluator, Score
from fedpai.federation.layout import Layout
from fedpai.federation.payload import PayloadError
from fedpai.federation.progress import Progress
from fedpai.federation.seeds import generator
from fedpai.federation.server import Server, Update
from fedpai.methods.base import Method, MethodError

Row = dict[str, Any]
Accept = Callable[[Server, int, list[bytes]], Update]


@dataclass
class Reply:
    """A client's answer.

    Attributes:
        messages: what goes to the server, as bytes.
        log: what its training measured; reporting only, the server's arithmetic never uses it.
        seconds: wall-clock of the client's whole turn, from the arrival of its messages to its answer; evaluating its
            model, which serves the metrics alone, is left out.
        personal_accuracy: of its own model on its own class mix, where the method asks for it.
        density: share of the weights that its model keeps, where only the client knows it.
    """

    messages: list[bytes]
    log: TrainingLog = field(default_factory=TrainingLog)
    seconds: float = 0.0
    personal_accuracy: float | None = None
    density: float | None = None


class Link(Protocol):
    """The way to the clients."""

    def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
        """Delivers messages to a client, lets it take its turn, brings its answer.

        Raises:
            ClientError: the client cannot be reached or gave up.
            PayloadError: the client refused what it was sent.
        """
        ...


class LocalClients:
    """Clients in this process, one after the other, each seeing only its own images and its own memory."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        layout: Layout,
        data: Dataset,
        partition: Sequence[np.ndarray],
        pool: ModelPool,
        evaluator: Evaluator,
        progress: Progress,
    ) -> None:
        self._config = config
        self._method = method
        self._layout = layout
        self._data = data
        self._partition = partition
        self._pool = pool
        self._evaluator = evaluator
        self._progress = progress
        self.memories = {client: ClientMemory() for client in range(len(partition))}

    def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
        """See `Link.turn`. What goes wrong in a client's own work is that client's failure, not the server's."""
        try:
            return self._turn(client, round, messages)
        except (ClientError, ConfigError, PayloadError):
            raise
        except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:
            raise ClientError(f"{type(error).__name__}: {error}") from error

    def _turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
        me = self._client(client, round)
        start = time.perf_counter()
        me.receive(messages, self._method.takes)
        if round == 0:
            answer = self._method.propose(me)
            return Reply(answer, seconds=time.perf_counter() - start)
        self._method.train(me)
        trained = time.perf_counter()
        accuracy = self._personal_accuracy(me) if self._method.personal else None
        density = None if self._method.has_global else me.density()
        answering = time.perf_counter()
        answer = self._method.answer(me)
        seconds = trained - start + time.perf_counter() - answering
        return Reply(answer, me.log, seconds, accuracy, density)

    def held_accuracy(self, round: int, messages: Iterable[tuple[int, list[bytes]]]) -> float | None:
        """n_k mean over all clients, each by the model that it holds after the last round, on its own class mix.

        Where models stay on the clients, that is the one it keeps; otherwise the one it is sent last, calibrated.

        Args:
            messages: by client, what the server sends last (`Federation.last_messages`).

        Returns:
            None where nothing is sent and no models stay on the clients, or one of them has none.
        """
        found = []
        if self._method.has_global:
            for client, sent in messages:
                me = self._client(client, round)
                me.receive(sent, self._method.takes)
                me.calibrate()
                found.append((me.examples, self._personal_accuracy(me)))
            return _mean_accuracy(found)
        for client in self.memories:
            me = self._client(client, round)
            self._method.recall(me)
            if me.floats is None:
                return None
            found.append((me.examples, self._personal_accuracy(me)))
        return _mean_accuracy(found)

    def _client(self, client: int, round: int) -> Client:
        return Client(
            id=client,
            round=round,
            config=self._config,
            layout=self._layout,
            data=self._data,
            indices=self._partition[client],
            memory=self.memories[client],
            pool=self._pool,
            on_step=self._progress.step,
        )

    def _personal_accuracy(self, me: Client) -> float:
        score = self._evaluator.score(me.bound(), self._pool)
        labels = self._data.train_labels.numpy()[me.indices]
        return score.under(np.bincount(labels, minlength=self._evaluator.classes))


class Federation:
    """The server's program for one method.

    Attributes:
        server: the state that a checkpoint saves.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        server: Server,
        link: Link,
        pool: ModelPool,
        evaluator: Evaluator,
        progress: Progress,
    ) -> None:
        self.config = config
        self.method = method
        self.server = server
        self._link = link
        self._pool = pool
        self._evaluator = evaluator
        self._progress = progress

    def choose_masks(self) -> Row:
        """Round 0: masks are chosen and the untrained model is evaluated."""
        start = time.perf_counter()
        turns = _Turns()
        self.method.choose_masks(self.server)
        self._round_to_wire()
        merge = time.perf_counter() - start
        everybody = list(range(self.config.clients))
        if self.method.asks_clients:
            self._turns(everybody, turns, self.method.accept_proposal)
            agreeing = time.perf_counter()
            self.method.agree(self.server, turns.updates)
            self._round_to_wire()
            merge += time.perf_counter() - agreeing
        sampled = everybody if self.method.asks_clients else []
        masks = time.perf_counter() - start
        merge += turns.serving
        return self._row(sampled, turns, start, masks=masks, proposals=sum(turns.turn_seconds), merge=merge)

    def run_round(self) -> Row:
        """One round of training."""
        start = time.perf_counter()
        self.server.round += 1
        sampled = self._sample()
        turns = _Turns()
        self._turns(sampled, turns, self.method.accept)
        merging = time.perf_counter()
        if turns.updates:
            self.method.merge(self.server, turns.updates)
            self._round_to_wire()
        merging = time.perf_counter() - merging
        return self._row(sampled, turns, start, merge=merging + turns.serving)

    def last_messages(self) -> Iterator[tuple[int, list[bytes]]]:
        """After the last round, by client: its personal mask's part of the merged model. Nothing in other forms.

        They are no part of any round and are not counted, as little as the download of a global model when all is done.
        """
        if self.method.personal and self.method.has_global:
            for client in sorted(self.server.client_masks):
                yield client, self.method.send(self.server, client)

    def _round_to_wire(self) -> None:
        try:
            self.server.round_to_wire()
        except PayloadError as error:
            raise MethodError(f"--wire {self.config.wire} cannot carry the global model: {error}") from None

    def _sample(self) -> list[int]:
        """The clients of this round, ascending. One whose mask was refused sits out."""
        server = self.server
        able = sorted(server.client_masks) if server.client_masks else list(range(self.config.clients))
        count = min(self.config.sample, len(able))
        draw = generator(self.config.seed, "clients of a round", server.round)
        return sorted(int(client) for client in draw.choice(able, count, replace=False))

    def _turns(self, clients: list[int], turns: _Turns, accept: Accept) -> None:
        for number, client in enumerate(clients):
            self._progress.client(number, len(clients), client)
            serving = time.perf_counter()
            down = self.method.send(self.server, client)
            turns.serving += time.perf_counter() - serving
            turns.begin(client, sum(map(len, down)))
            try:
                reply = self._link.turn(client, self.server.round, down)
                self.server.informed.add(client)
                turns.add(reply)
                serving = time.perf_counter()
                try:
                    update = accept(self.server, client, reply.messages)
                finally:
                    turns.serving += time.perf_counter() - serving
            except (PayloadError, ClientError) as error:
                turns.refused.append({"client": client, "reason": str(error)})
                self.server.informed.discard(client)  # whatever mask it may have by now, it is told its own again
                self._progress.note(f"round {self.server.round}: client {client} refused: {error}")
            else:
                turns.updates.append(update)
                if reply.personal_accuracy is not None:
                    turns.personal.append((update.examples, reply.personal_accuracy))

    def _row(self, sampled: list[int], turns: _Turns, start: float, **parts: float) -> Row:
        server = self.server
        evaluating = time.perf_counter()
        score = self._score()
        evaluating = time.perf_counter() - evaluating
        masks = [mask for mask in (server.mask_of(client) for client in sampled) if mask is not None]
        overall = 1.0 if server.mask is None else server.mask.density
        return {
            "method": self.method.name,
            "round": server.round,
            "accuracy": None if score is None else score.accuracy,
            "test_loss": None if score is None else _finite(score.loss),
            "personal_accuracy": _mean_accuracy(turns.personal),
            "held_accuracy": None,
            "train_loss": _finite(turns.loss / turns.images) if turns.images else None,
            "sampled": sampled,
            "refused": turns.refused,
            "examples": sum(update.examples for update in turns.updates),
            "images": turns.images,
            "steps": turns.steps,
            "bytes_up": sum(client["bytes_up"] for client in turns.clients),
            "bytes_down": sum(client["bytes_down"] for client in turns.clients),
            "clients": turns.clients,
            "density": fmean(turns.densities or [mask.density for mask in masks] or [overall]),
            "global_density": None if score is None else overall,
            "time": {
                "compute": turns.seconds,
                "clients": turns.turn_seconds,
                "step_ms": [round(ms, 3) for ms in turns.step_ms],
                "evaluate": evaluating,
                "round": time.perf_counter() - start,
                **parts,
            },
        }

    def _score(self) -> Score | None:
        """The global model's, if there is one."""
        if not self.method.has_global:
            return None
        bound = self._pool.get(self.server.mask)
        bound.load(self.server.floats, self.server.ints)
        return self._evaluator.score(bound, self._pool)


def _finite(value: float) -> float | None:
    """JSON has no NaN; a loss that ran away is null."""
    return value if math.isfinite(value) else None


def _mean_accuracy(accuracies: Sequence[tuple[int, float]]) -> float | None:
    """Mean weighted by n_k, over those that are known."""
    known = [(n, accuracy) for n, accuracy in accuracies if math.isfinite(accuracy)]
    total = sum(n for n, _ in known)
    return sum(n * accuracy for n, accuracy in known) / total if total else None


@dataclass
class _Turns:
    """What the turns of one round add up to.

    Attributes:
        clients: what travelled to and from each client, in the order of their turns; a failed one sent nothing.
        turn_seconds: how long each of these turns took; 0 for a failed one.
        seconds: of all training steps.
        serving: of the server's own work between the turns: encoding what it sends, checking what comes back.
    """

    updates: list[Update] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    personal: list[tuple[int, float]] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    clients: list[dict[str, int]] = field(default_factory=list)
    turn_seconds: list[float] = field(default_factory=list)
    serving: float = 0.0
    seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    loss: float = 0.0

    def begin(self, client: int, bytes_down: int) -> None:
        self.clients.append({"client": client, "bytes_up": 0, "bytes_down": bytes_down})
        self.turn_seconds.append(0.0)

    def add(self, reply: Reply) -> None:
        self.clients[-1]["bytes_up"] = sum(map(len, reply.messages))
        self.turn_seconds[-1] = reply.seconds
        self.seconds += reply.log.seconds
        self.step_ms += reply.log.step_ms
        self.steps += reply.log.steps
        self.images += reply.log.images
        self.loss += reply.log.loss
        if reply.density is not None:
            self.densities.append(reply.density)
