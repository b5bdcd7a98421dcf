"""The networks of the built-in tasks.

All take float32 images (N, channels, height, width) and give logits (N, 10). Parameters start from torch's own
defaults: they train better than the papers' truncated normal 0.1 with bias 0.1.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def mlp(*widths: int) -> nn.Module:
    """Fully connected layers with ReLU between them; `widths` are those of input, hidden layers and output."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(widths), 1):
        if number > 1:
            layers[f"relu{number - 1}"] = nn.ReLU()
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)


def fc300() -> nn.Module:
    """FC-300-100: 784-300-100-10 with 266,610 parameters, for (N, 1, 28, 28)."""
    return mlp(784, 300, 100, 10)


def digits_cnn() -> nn.Module:
    """Two 3x3 convolutions and two linear layers, for (N, 1, 8, 8); 38,282 parameters."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(512, 64),
            relu3=nn.ReLU(),
            fc2=nn.Linear(64, 10),
        )
    )


def lenet() -> nn.Module:
    """LeNet of the nested dithering paper: 5x5x32, 5x5x64, 3136x512, 512x10, for (N, 1, 28, 28).

    1,663,370 parameters (Abdi and Fekri, arXiv 1904.01197, released scripts).
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(3136, 512),
            relu3=nn.ReLU(),
            fc2=nn.Linear(512, 10),
        )
    )


def cifarnet() -> nn.Module:
    """CifarNet of the same paper: 5x5x64, 5x5x64, 2304x384, 384x192, 192x10, for (N, 3, 24, 24).

    1,068,298 parameters. The local response normalisation of the TensorFlow tutorial, which it comes from, is left out:
    it has no parameters and costs more time than it earns accuracy.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(2304, 384),
            relu3=nn.ReLU(),
            fc2=nn.Linear(384, 192),
            relu4=nn.ReLU(),
            fc3=nn.Linear(192, 10),
        )
    )


def resnet18() -> nn.Module:
    """ResNet-18 for (N, 3, 32, 32): torchvision's with a 3x3 stem and without max-pooling; 11,173,962 parameters."""
    from torchvision.models import resnet18 as build  # seconds to import, so only who needs it waits

    network: nn.Module = build(num_classes=10)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does for the others
    network.conv1 = stem
    network.maxpool = nn.Identity()
    return network
