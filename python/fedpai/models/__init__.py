# SPDX-License-Identifier: Apache-2.0
"""Networks in the forms that the pruning literature uses for 32x32 images.

>>> model = create("resnet18", num_classes=10, in_channels=1, seed=0)

Every network is built of plain ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.ReLU``, pooling, ``nn.Flatten`` and
``nn.Linear`` modules, a transformer of ``nn.LayerNorm`` and ``nn.GELU`` besides, one module per use, so that hooks
and ``torch.fx`` see every step.
"""

from fedpai.models.init import Network
from fedpai.models.registry import create, names
from fedpai.models.resnet import ResNet
from fedpai.models.small import MLP, Conv4, LeNet5
from fedpai.models.vgg import VGG
from fedpai.models.vit import ViT
from fedpai.models.wideresnet import WideResNet

__all__ = ["MLP", "VGG", "Conv4", "LeNet5", "Network", "ResNet", "ViT", "WideResNet", "create", "names"]
