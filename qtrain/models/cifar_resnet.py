"""The ResNet for small images of He et al. 2015: new, or with weights from a safetensors file. The network is in `qtrain/resnet.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtrain.image_models import ImageModel, load_weights, read_weights
from qtrain.images import ImageSpec
from qtrain.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPTHS = (20, 32, 44, 56, 110)


@register("model", "cifar_resnet")
@dataclass
class CifarResNet(ImageModel):
    """The CIFAR ResNet (He et al. 2015, option A), 20 to 110 layers deep, for small images."""

    depth: int = 20
    """Layers: 20, 32, 44, 56 or 110."""
    channels: int = 3
    """Channels of the images: 3 for colour, 1 for gray."""
    path: str | None = None
    """A safetensors file, or a folder with model.safetensors; null: new weights, to be trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth not in DEPTHS:
            raise ValueError(f"model.depth is {self.depth}; valid: {', '.join(map(str, DEPTHS))}. Set model.depth=20, say.")
        if self.channels < 1:
            raise ValueError(f"model.channels is {self.channels}; it must be at least 1. Set model.channels=3, say.")

    def processor(self) -> ImageSpec:
        """Images of any size; a file of weights does not say how its images were normalised."""
        return ImageSpec("pixel_values", self.channels)

    def network(self, num_labels: int) -> nn.Module:
        """The network, with the weights of `path`."""
        from qtrain import resnet

        model = resnet.CifarResNet(self.depth, self.channels, num_labels)
        if self.path is None:
            self.new_parameters = [name for name, _ in model.named_parameters()]
            return model
        state, source = read_weights(self.path, "model.path")
        self.new_parameters = load_weights(model, state, source, ["linear"], self._hint(state))
        return model

    def _hint(self, state: dict[str, Tensor]) -> str:
        """What the file itself says about depth and channels."""
        depth = 6 * len({name.split(".")[1] for name in state if name.startswith("layer1.")}) + 2
        stem = state.get("conv1.weight")
        channels = stem.shape[1] if stem is not None and stem.ndim == 4 else self.channels
        if depth in DEPTHS and (depth, channels) != (self.depth, self.channels):
            return f"It is a network of depth {depth} for {channels} channels: set model.depth={depth} model.channels={channels}"
        return "Set model.path=FILE to the weights of a CIFAR ResNet (conv1, layer1.0.conv1, …, linear), or model.path=null for new weights"
