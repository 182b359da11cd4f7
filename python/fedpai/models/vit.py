# SPDX-License-Identifier: Apache-2.0
"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) for 32x32 images: patches of 4x4 pixels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fedpai.models.init import Network, scaled

PATCH = 4
HEAD_CHANNELS = 64
DEPTH = 12
# Attention heads; with 64 channels each these are the ViT-Ti and ViT-S of Touvron et al., arXiv 2012.12877.
HEADS = {"tiny": 3, "small": 6}


class Attention(nn.Module):
    """Multi-head self-attention: one linear layer to queries, keys and values, one out."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        channels = heads * HEAD_CHANNELS
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, T, channels) to the same shape."""
        heads = self.qkv(x).unflatten(2, (3 * self.heads, HEAD_CHANNELS)).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)  # (N, heads, T, HEAD_CHANNELS)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a hidden layer of four times the channels, each after a norm and added to its input."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        channels = heads * HEAD_CHANNELS
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(heads)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, T, channels) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class ViT(Network):
    """Patches with learned positions, twelve blocks, the mean over all tokens, one linear layer.

    The mean takes the place of the class token of the original (Beyer, Zhai, Kolesnikov, arXiv 2205.01580).

    Args:
        size: "tiny" (192 channels, 3 heads) or "small" (384 channels, 6 heads).
        num_classes: outputs.
        in_channels: channels of the image.
        width: factor on the number of heads, and so on all channel counts; a head keeps its 64 channels.
        image_size: side of the square image, a multiple of 4.
    """

    def __init__(
        self,
        size: str,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if size not in HEADS:
            raise ValueError(f"size: got {size!r}, expected one of {sorted(HEADS)}")
        if image_size < PATCH or image_size % PATCH:
            raise ValueError(f"image_size: got {image_size}, expected a multiple of {PATCH}, the patch of a ViT")
        heads = scaled(HEADS[size], width)
        channels = heads * HEAD_CHANNELS
        self.patches = nn.Conv2d(in_channels, channels, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.empty(1, (image_size // PATCH) ** 2, channels))
        self.blocks = nn.Sequential(*(Block(heads) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, num_classes)
        self._init()

    def _init(self) -> None:
        """Weights of variance ``1 / fan_in``, as no ReLU follows any layer; positions of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, image_size, image_size) to logits (N, num_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.blocks(x)).mean(1))
