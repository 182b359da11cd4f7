# SPDX-License-Identifier: Apache-2.0
"""Small networks: two forms of LeNet, Conv-4 and a multi-layer perceptron. Their size depends on the image's."""

from __future__ import annotations

import torch
from torch import nn

from fedpai.models.init import Network, init_kaiming_, scaled


class LeNet5(Network):
    """Two 5x5 convolutions without padding, three linear layers, biases, ReLU and max pooling.

    Channels 6 and 16, hidden units 120 and 84, as in LeCun et al., "Gradient-based learning applied to
    document recognition" (1998); ReLU and max pooling replace its squashing functions and trained
    subsampling.
    """

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32
    ) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size: got {image_size}, expected at least 16 for lenet5")
        first, second, hidden1, hidden2 = (scaled(n, width) for n in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * side * side, hidden1)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden1, hidden2)
        self.relu4 = nn.ReLU()
        self.classifier = nn.Linear(hidden2, num_classes)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, image_size, image_size) to logits (N, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(self.flatten(x)))
        return self.classifier(self.relu4(self.fc2(x)))


class LeNet2050500(Network):
    """Two 5x5 convolutions without padding and two linear layers, all without bias, ReLU and max pooling.

    Channels 20 and 50, hidden units 500: the network of SpaFL's experiments on Fashion-MNIST (arXiv 2406.00431, from
    its released code), 430,500 weights and 580 filters and neurons on images of 28x28x1. Initial weights as of all
    networks here; that code has torch's default ones.
    """

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32
    ) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size: got {image_size}, expected at least 16 for lenet-20-50-500")
        first, second, hidden = (scaled(n, width) for n in (20, 50, 500))
        self.conv1 = nn.Conv2d(in_channels, first, 5, bias=False)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5, bias=False)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * side * side, hidden, bias=False)
        self.relu3 = nn.ReLU()
        self.classifier = nn.Linear(hidden, num_classes, bias=False)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, image_size, image_size) to logits (N, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.classifier(self.relu3(self.fc1(self.flatten(x))))


class Conv4(Network):
    """3x3 convolutions 64-64-pool-128-128-pool and linear layers 256-256-classes (Frankle and Carbin,
    arXiv 1803.03635).

    Args:
        batch_norm: convolutions without bias and with batch norm (default), or with bias and no norm.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        image_size: int = 32,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        side = image_size // 4
        if side < 1:
            raise ValueError(f"image_size: got {image_size}, expected at least 4 for conv4")
        layers: list[nn.Module] = []
        channels = in_channels
        for out in (scaled(n, width) for n in (64, 64, 128, 128)):
            layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU())
            channels = out
        half = len(layers) // 2
        self.features = nn.Sequential(*layers[:half], nn.MaxPool2d(2), *layers[half:], nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        hidden = scaled(256, width)
        self.fc1 = nn.Linear(channels * side * side, hidden)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, hidden)
        self.relu2 = nn.ReLU()
        self.classifier = nn.Linear(hidden, num_classes)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, image_size, image_size) to logits (N, num_classes)."""
        x = self.relu1(self.fc1(self.flatten(self.features(x))))
        return self.classifier(self.relu2(self.fc2(x)))


class MLP(Network):
    """Two hidden layers of 128 ReLU units with biases; at 28x28x1 and ten classes this is 784-128-128-10."""

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32
    ) -> None:
        super().__init__()
        hidden = scaled(128, width)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(in_channels * image_size * image_size, hidden)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, hidden)
        self.relu2 = nn.ReLU()
        self.classifier = nn.Linear(hidden, num_classes)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, image_size, image_size) to logits (N, num_classes)."""
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.classifier(self.relu2(self.fc2(x)))
