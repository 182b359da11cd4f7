# SPDX-License-Identifier: Apache-2.0
"""Generated images for machines without data: coloured, textured shapes on a noisy ground.

A class is a pair of outline and texture; in colour images it also prefers a hue, which overlaps others'.
Position, size, tilt, stripe width, brightness, ground and noise vary, so that a linear model does badly and a
small convolutional network does well. Results on it say nothing about real images.
"""

from __future__ import annotations

import math

import torch

from fedpai.data.dataset import Dataset

SHAPES = 5
TEXTURES = 4
# Images generated at a time; bounds the scratch memory.
_CHUNK = 2048


def synthetic(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    train_size: int = 6000,
    test_size: int = 1000,
    seed: int = 0,
) -> Dataset:
    """Generate a data set; the same arguments give the same images.

    Args:
        num_classes: 2 to 20; labels are balanced to within one image.
        in_channels: 3 (colour) or 1 (grey).
        image_size: side of the square images, at least 8.
        train_size, test_size: numbers of images, at least one of each class.
        seed: of the generator that draws everything.

    Raises:
        ValueError: an argument out of the ranges above.
    """
    if not 2 <= num_classes <= SHAPES * TEXTURES:
        raise ValueError(f"num_classes: got {num_classes}, expected 2 to {SHAPES * TEXTURES}")
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels: got {in_channels}, expected 1 or 3")
    if image_size < 8:
        raise ValueError(f"image_size: got {image_size}, expected at least 8")
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        if size < num_classes:
            raise ValueError(f"{name}: got {size}, expected at least one image a class ({num_classes})")
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for size in (train_size, test_size):
        labels = (torch.arange(size) % num_classes)[torch.randperm(size, generator=generator)]
        images = [
            _draw(part, num_classes, in_channels, image_size, generator) for part in labels.split(_CHUNK)
        ]
        splits.append((torch.cat(images), labels))
    name = "synthetic" if in_channels == 3 else "synthetic-gray"
    return Dataset.from_arrays(name, splits[0], splits[1], num_classes)


def _draw(
    labels: torch.Tensor, num_classes: int, in_channels: int, size: int, generator: torch.Generator
) -> torch.Tensor:
    """uint8 (N, C, size, size) for the labels (N,)."""
    count = len(labels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    tilt = uniform(-0.25, 0.25)
    radius = uniform(0.45, 0.75)
    y = (axis.view(1, -1, 1) - uniform(-0.25, 0.25)) / radius
    x = (axis.view(1, 1, -1) - uniform(-0.25, 0.25)) / radius
    u, v = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    # About two pixels of soft edge.
    inside = torch.sigmoid(_outline(u, v, labels % SHAPES) * radius * size)
    ink = 0.35 + 0.65 * _texture(u, v, labels // SHAPES, uniform(2.2, 3.2), uniform(0, 2 * math.pi))

    dark, light = uniform(0.05, 0.3), uniform(0.65, 1.0)
    ground = dark + 0.15 * axis.view(1, -1, 1) * uniform(-1, 1)
    if in_channels == 1:
        image = (ground * (1 - inside) + light * ink * inside).unsqueeze(1)
    else:
        hue = labels.view(-1, 1, 1) / num_classes + 0.08 * torch.randn(count, 1, 1, generator=generator)
        other = torch.rand(count, 1, 1, generator=generator)
        image = ground.unsqueeze(1) * _rgb(other) * (1 - inside.unsqueeze(1))
        image = image + light.unsqueeze(1) * _rgb(hue) * (ink * inside).unsqueeze(1)
    image = image + 0.06 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _outline(u: torch.Tensor, v: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Positive inside, negative outside: disc, square, triangle, cross, ring, by ``shape`` (N,)."""
    r = (u.square() + v.square()).sqrt()
    bar = torch.minimum(u.abs(), v.abs())
    forms = torch.stack(
        [
            0.9 - r,
            0.75 - torch.maximum(u.abs(), v.abs()),
            torch.minimum(0.65 - v, v * 0.5 - u.abs() * 0.87 + 0.45),
            torch.minimum(0.28 - bar, 0.95 - torch.maximum(u.abs(), v.abs())),
            0.25 - (r - 0.7).abs(),
        ]
    )
    return forms[shape, torch.arange(len(shape))]


def _texture(
    u: torch.Tensor, v: torch.Tensor, texture: torch.Tensor, frequency: torch.Tensor, phase: torch.Tensor
) -> torch.Tensor:
    """Ink in [0, 1]: plain, stripes along, stripes across, checks, by ``texture`` (N,)."""
    along = 0.5 + 0.5 * torch.sin(math.pi * frequency * v + phase)
    across = 0.5 + 0.5 * torch.sin(math.pi * frequency * u + phase)
    checks = (along - 0.5) * (across - 0.5) * 2 + 0.5
    return torch.stack([torch.ones_like(along), along, across, checks])[texture, torch.arange(len(texture))]


def _rgb(hue: torch.Tensor) -> torch.Tensor:
    """Hue (N, 1, 1) on a circle of length 1 to colours (N, 3, 1, 1) between 0.2 and 1."""
    angle = 2 * math.pi * (hue.view(-1, 1) - torch.tensor([0.0, 1 / 3, 2 / 3]))
    return (0.6 + 0.4 * angle.cos()).view(-1, 3, 1, 1)
