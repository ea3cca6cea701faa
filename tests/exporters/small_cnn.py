"""A small convolutional network with everything that integer kernels meet, quantized and ready to export."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.grids.affine import Affine, Int8, Int8Activation
from qtrain.quantizers.ptq_dynamic import PtqDynamic
from qtrain.quantizers.ptq_static import PtqStatic

SYMMETRIC = Affine(bits=8, rule="absmax_onnx", granularity="tensor")


class SmallCnn(nn.Module):
    """[N, 3, 8, 8] -> [N, 3]: batch-norm, max-pool, residual sum, option-A shortcut, depthwise, concatenation, average pool."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.point = nn.Conv2d(16, 8, 1, bias=False)
        self.classifier = nn.Linear(24, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(pixel_values))), 2)
        x = F.relu(x + self.inner(F.relu(self.middle(x))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.down(x) + shortcut)
        x = torch.cat([F.relu6(self.depthwise(x)), self.point(x)], 1)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images(count: int = 3, channels: int = 3, size: int = 8) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            {"pixel_values": torch.randn(16 + i, channels, size, size, generator=generator)},
            torch.randint(0, 3, (16 + i,), generator=generator),
        )
        for i in range(count)
    ]


def quantized_cnn(model: nn.Module, dynamic: bool = False, keep_float: list[str] | None = None, **grids: Any) -> nn.Module:
    """A converted copy, with ranges from `images`."""
    given = {"weight": Int8(), "embedding": Int8(), "activation": Int8Activation(), **grids}
    scheme = (PtqDynamic if dynamic else PtqStatic)(**given)
    prepared, _ = scheme.prepare(copy.deepcopy(model).eval(), keep_float or [])
    scheme.calibrate(prepared, [inputs for inputs, _ in images()])
    return scheme.convert(prepared)
