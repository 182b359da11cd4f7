# SPDX-License-Identifier: Apache-2.0
"""Networks by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial

import torch

from fedpai.models.init import Network
from fedpai.models.resnet import ResNet
from fedpai.models.small import MLP, Conv4, LeNet5, LeNet2050500
from fedpai.models.vgg import VGG
from fedpai.models.vit import ViT
from fedpai.models.wideresnet import WideResNet

# Fully convolutional: any image that survives the halvings; the smallest allowed side is beside each.
_CONVOLUTIONAL: dict[str, tuple[Callable[..., Network], int]] = {
    "vgg11": (partial(VGG, 11), 16),
    "vgg16": (partial(VGG, 16), 16),
    "vgg19": (partial(VGG, 19), 16),
    "resnet18": (partial(ResNet, 18), 8),
    "resnet34": (partial(ResNet, 34), 8),
    "wideresnet": (partial(WideResNet, 28, 10), 4),
    "wrn16x4": (partial(WideResNet, 16, 4), 4),
    "wrn28x10": (partial(WideResNet, 28, 10), 4),
}
# Built for one image size.
_SIZED: dict[str, Callable[..., Network]] = {
    "lenet5": LeNet5,
    "lenet-20-50-500": LeNet2050500,
    "conv4": Conv4,
    "conv4-nonorm": partial(Conv4, batch_norm=False),
    "mlp": MLP,
    "vit-tiny": partial(ViT, "tiny"),
    "vit-small": partial(ViT, "small"),
}
_WIDE = re.compile(r"wrn(\d{1,4})x(\d{1,3})")


def names() -> list[str]:
    """The names that :func:`create` knows; ``wrn<depth>x<widen>`` works for every depth 6 n + 4 besides."""
    return sorted([*_CONVOLUTIONAL, *_SIZED])


def create(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    image_size: int = 32,
    seed: int | None = None,
) -> Network:
    """Build a network with fresh Kaiming weights, float32, in train mode.

    Args:
        name: one of :func:`names`, or ``wrn<depth>x<widen>``.
        num_classes: outputs.
        in_channels: channels of the image (1 for Fashion-MNIST).
        width: factor on all hidden channel and unit counts, of a transformer on its heads.
        image_size: side of the square image.
        seed: draw the weights from this seed and leave torch's global generator alone; ``None`` draws from
            the global generator.

    Returns:
        The module. Its attribute ``input_shape`` is ``(in_channels, image_size, image_size)``.

    Raises:
        ValueError: an unknown name, or a size that the network cannot have.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1")
    if not 0 < width < float("inf"):
        raise ValueError(f"width: got {width}, expected a positive number")
    build, smallest = _find(name, image_size)
    if image_size < smallest:
        raise ValueError(f"image_size: got {image_size}, expected at least {smallest} for {name}")
    scope = contextlib.nullcontext() if seed is None else torch.random.fork_rng(devices=[])
    with scope:
        if seed is not None:
            torch.manual_seed(seed)
        model = build(num_classes=num_classes, in_channels=in_channels, width=width)
    model.input_shape = (in_channels, image_size, image_size)
    return model


def _find(name: str, image_size: int) -> tuple[Callable[..., Network], int]:
    """The constructor for a name and the smallest image side it takes."""
    if name in _CONVOLUTIONAL:
        return _CONVOLUTIONAL[name]
    if name in _SIZED:
        return partial(_SIZED[name], image_size=image_size), 1
    wide = _WIDE.fullmatch(name)
    if wide:
        return partial(WideResNet, int(wide[1]), int(wide[2])), 4
    raise ValueError(
        f"name: unknown model {name!r}, expected one of {', '.join(names())} or wrn<depth>x<widen>"
    )
