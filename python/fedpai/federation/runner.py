# SPDX-License-Identifier: Apache-2.0
"""Puts a run together and carries it through: methods round by round, rows and checkpoints to disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedpai import data as images
from fedpai import methods, models, pruning
from fedpai.data import Dataset
from fedpai.federation import checkpoint
from fedpai.federation.bound import ModelPool
from fedpai.federation.config import ConfigError, RunConfig, one_of
from fedpai.federation.engine import Federation, LocalClients, Row
from fedpai.federation.evaluate import Evaluator
from fedpai.federation.folder import RunFolder, held
from fedpai.federation.layout import Layout
from fedpai.federation.progress import Progress
from fedpai.federation.seeds import derive, generator
from fedpai.federation.server import Server
from fedpai.methods.fixed import chooser

LOCAL_DATA = Path("data")
"""Where `make data` unpacks files on a machine that it may not install packages on."""


@dataclass
class Arm:
    """One method of a run, ready to go on.

    Attributes:
        federation, clients: the server's program and the clients it reaches.
        done: rounds that are finished and saved; -1 before masks are chosen.
    """

    federation: Federation
    clients: LocalClients
    done: int = -1

    @property
    def name(self) -> str:
        """The method's name."""
        return self.federation.method.name


class Run:
    """A whole run: data, partition, and one arm per method, all from the same initial model.

    Args:
        config: the settings.
        folder: where to save; None keeps everything in memory.
        progress: who is told.
        data: images to use instead of loading `config.data` (for a data set of one's own).

    Raises:
        ConfigError: unknown names, or settings that do not go together.
        DataError: data that is missing or damaged.
        FolderError: a folder whose checkpoints do not belong to this run.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
        *,
        data: Dataset | None = None,
    ) -> None:
        check_names(config)
        torch.set_num_threads(config.threads)
        self.config = config
        self.folder = folder
        self.progress = progress or Progress()
        self.data = load_data(config) if data is None else data
        self.partition = split(config, self.data)
        model = create_model(config, self.data)
        self.layout = Layout.of(model)
        for method in (methods.create(name, config) for name in config.arms):
            if "sparsity" in method.uses:
                chooser(method.config, model)  # masks that cannot be are refused before anything is written
        self.pool = self._pool()
        self.evaluator = Evaluator(self.data, config.eval_images, config.seed)
        self.arms = [self._arm(name) for name in config.arms]
        self.rows: list[Row] = []
        if folder is not None:
            self.rows = folder.keep_rows({arm.name: arm.done for arm in self.arms if arm.done >= 0})

    def _pool(self) -> ModelPool:
        form = torch.channels_last if self.config.dense_format == "channels_last" else torch.contiguous_format
        return ModelPool(lambda: create_model(self.config, self.data), self.layout, form)

    def _arm(self, name: str) -> Arm:
        config = self.config
        method = methods.create(name, config)
        clients = LocalClients(
            config, method, self.layout, self.data, self.partition, self.pool, self.evaluator, self.progress
        )
        restored = self.folder.restore(name, self.pool) if self.folder else None
        if restored is None:
            floats, ints = self.layout.gather(create_model(config, self.data).state_dict())
            server = Server(config, self.layout, self.pool, floats, ints)
        else:
            server = restored.server
            clients.memories = restored.memories
        federation = Federation(config, method, server, clients, self.pool, self.evaluator, self.progress)
        return Arm(federation, clients, -1 if restored is None else server.round)

    def finish(self) -> list[Row]:
        """Runs whatever is left and returns all rows.

        Methods take turns round by round, so that a machine that slows down slows all of them. After each
        round of each method its row and its checkpoint are on disk; an interruption loses the current round.
        """
        self.progress.begin(self.config.arms, self.config.rounds, max(0, min(arm.done for arm in self.arms)))
        try:
            for number in range(self.config.rounds + 1):
                for arm in self.arms:
                    if arm.done < number:
                        self._round(arm, number)
        finally:
            self.progress.end()
        if self.folder is not None:
            for arm in (arm for arm in self.arms if arm.federation.method.has_global):
                self.folder.write(f"model-{arm.name}.safetensors", self.final_model(arm))
        return self.rows

    def _round(self, arm: Arm, number: int) -> None:
        self.progress.round(arm.name, number)
        row = arm.federation.choose_masks() if number == 0 else arm.federation.run_round()
        if number == self.config.rounds:
            row["held_accuracy"] = arm.clients.held_accuracy(number, arm.federation.last_messages())
        if self.folder is not None:
            self.folder.append(row)
            self.folder.save(arm.name, checkpoint.dump(arm.name, arm.federation.server, arm.clients.memories))
        arm.done = number
        self.rows.append(row)
        self.progress.row(row)

    def final_model(self, arm: Arm) -> bytes:
        """The global model as a dense state_dict in safetensors form."""
        from safetensors.torch import save

        return save(self.layout.scatter(*arm.federation.server.dense()))


def check_names(config: RunConfig) -> None:
    """Raises ConfigError for a method, data set or criterion that does not exist."""
    for name in config.arms:
        methods.create(name, config)
    one_of("data", config.data, images.names())
    one_of("criterion", config.criterion, pruning.criteria())


def load_data(config: RunConfig) -> Dataset:
    """The data set of a run: from `data_root`, else from where the loader looks, else from ./data.

    Raises:
        ConfigError: settings that do not go together, such as a folder for generated images.
        DataError: from the loader.
    """
    try:
        return images.load(config.data, config.data_root)
    except images.DataError:
        if config.data_root is not None or not LOCAL_DATA.is_dir():
            raise
        return images.load(config.data, LOCAL_DATA)
    except ValueError as error:
        raise ConfigError(f"--data {config.data}: {error}") from None


def create_model(config: RunConfig, data: Dataset) -> nn.Module:
    """A fresh dense network; the same weights every time.

    Raises:
        ConfigError: a network that cannot have this size, or images that are not square.
    """
    channels, size, width = data.image_shape
    if size != width:
        raise ConfigError(f"--data {data.name}: expected square images, got {size} x {width} pixels")
    try:
        return models.create(
            config.model,
            num_classes=data.num_classes,
            in_channels=channels,
            width=config.width,
            image_size=size,
            seed=derive(config.seed, "initial weights"),
        )
    except ValueError as error:
        raise ConfigError(f"--model {config.model}: {str(error).removeprefix('name: ')}") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"--width {config.width}: a {config.model} of so many times its channels does not fit into memory"
        ) from None


def split(config: RunConfig, data: Dataset) -> list[np.ndarray]:
    """Each client's training examples: IID or Dirichlet over classes, thinned to `max_images` at random.

    Raises:
        ConfigError: a partition that cannot be drawn.
    """
    seed = derive(config.seed, "partition") & 0x7FFFFFFF
    try:
        if config.alpha is None:
            parts = images.partition_iid(data.train_labels, config.clients, seed)
        else:
            parts = images.partition_dirichlet(data.train_labels, config.clients, config.alpha, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--clients {config.clients}: {error}") from None
    chosen = []
    for client, part in enumerate(parts):
        indices = part.numpy()
        if config.max_images is not None and indices.size > config.max_images:
            draw = generator(config.seed, "images of a client", client)
            indices = np.sort(draw.choice(indices, config.max_images, replace=False))
        chosen.append(indices)
    return chosen


@contextmanager
def open_run(
    path: Path, asked: dict[str, object], *, resume: bool, base: RunConfig, progress: Progress
) -> Iterator[Run]:
    """Creates or reopens a run folder and puts its run together; the folder is held for the length of the block.

    Args:
        path: the folder.
        asked: settings given explicitly.
        resume: go on with the folder's run.
        base: the settings of a new run.

    Raises:
        FolderError, ConfigError, DataError: see `RunFolder` and `Run`; nothing was written then.
    """
    if resume:
        RunFolder.stored_config(path)  # a folder that holds no run is not made
        with held(path):
            folder = RunFolder.reopen(path, dict(asked))
            yield Run(folder.config, folder, progress)
        return
    RunFolder.check_vacant(path)
    run = Run(base, None, progress)
    with held(path):
        run.folder = RunFolder.create(path, base)
        yield run
