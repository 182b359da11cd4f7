# SPDX-License-Identifier: Apache-2.0
"""VGG with batch norm, in the form for 32x32 images (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

import torch
from torch import nn

from fedpai.models.init import Network, init_kaiming_, scaled

# Convolutions in each of the five stages and the stages' channels.
DEPTHS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(Network):
    """3x3 convolutions without bias, each with batch norm and ReLU; one linear layer.

    Max pooling halves the image after each of the first four stages, global average pooling ends the fifth.

    Args:
        depth: 11, 16 or 19 (counts the layers of the original, three linear ones included).
        num_classes: outputs.
        in_channels: channels of the image.
        width: factor on all channel counts.
    """

    def __init__(
        self, depth: int, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth: got {depth}, expected one of {sorted(DEPTHS)}")
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, (convs, base) in enumerate(zip(DEPTHS[depth], CHANNELS, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                out = scaled(base, width)
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), H and W at least 16, to logits (N, num_classes)."""
        return self.classifier(self.flatten(self.pool(self.features(x))))
