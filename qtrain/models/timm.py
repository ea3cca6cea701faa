"""Image classifiers of timm, by name, where that package is installed (`pip install qtrain[vision]`).

`model.pretrained=true` takes the weights that timm publishes on the Hugging Face hub, and with them their image size, mean and standard
deviation; `model.path` takes weights of a file, normalised as the published ones. A classifier of another number of classes is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtrain.image_models import ImageModel, load_weights, read_weights
from qtrain.images import ImageSpec
from qtrain.registry import register
from qtrain.vision import import_vision, require_name

if TYPE_CHECKING:
    from torch import nn


@register("model", "timm")
@dataclass
class Timm(ImageModel):
    """A timm classifier by name (`model.name=resnet10t`); needs `pip install qtrain[vision]`."""

    name: str = "resnet18"
    """Name in timm, with or without a tag of weights (`resnet10t.c3_in1k`)."""
    pretrained: bool = False
    """Take the published weights, from the Hugging Face hub or its cache."""
    path: str | None = None
    """A safetensors file, or a folder with model.safetensors, instead."""
    channels: int = 3
    """Channels of the images; for other than 3, published weights of the first layer are summed or repeated by timm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1:
            raise ValueError(f"model.channels is {self.channels}; it must be at least 1. Set model.channels=3, say.")
        if self.pretrained and self.path is not None:
            raise ValueError(f"model.pretrained=true and model.path={self.path} are two sources of weights. Set model.pretrained=false")

    def processor(self) -> ImageSpec:
        """Images of any size and normalisation for new weights of a network that takes any; else as the published weights have it."""
        published = self._published()
        trained = self.pretrained or self.path is not None
        fixed = trained or published.fixed_input_size
        mean, std = (tuple(published.mean), tuple(published.std)) if trained and self.channels == 3 else (None, None)
        return ImageSpec("x", self.channels, tuple(published.input_size[1:]) if fixed else None, mean, std)

    def network(self, num_labels: int) -> nn.Module:
        """The network, with the weights that were asked for."""
        published = self._published()
        model = self._create(num_labels)
        if self.path is not None:
            heads = published.classifier if isinstance(published.classifier, (tuple, list)) else [published.classifier]
            state, source = read_weights(self.path, "model.path")
            hint = f"Set model.name to the model that they are of, or model.path=null for new weights of {self.name}"
            self.new_parameters = load_weights(model, state, source, list(heads), hint)
        elif not self.pretrained:
            self.new_parameters = [name for name, _ in model.named_parameters()]
        elif published.num_classes != num_labels:
            modules = model.get_classifier()
            own = {id(p) for m in (modules if isinstance(modules, (tuple, list)) else [modules]) for p in m.parameters()}
            self.new_parameters = sorted(name for name, p in model.named_parameters() if id(p) in own)
        else:
            self.new_parameters = []
        return model

    def _create(self, num_labels: int) -> Any:
        timm = import_vision("timm")
        try:
            return timm.create_model(self.name, pretrained=self.pretrained, num_classes=num_labels, in_chans=self.channels)
        except (OSError, RuntimeError) as e:
            if not self.pretrained:
                raise
            raise OSError(
                f"the published weights of {self.name} could not be downloaded ({type(e).__name__}), and are not in the hub's cache. Run "
                "once with a network, or set model.pretrained=false model.path=FILE to a local safetensors file"
            ) from e

    def _published(self) -> Any:
        """timm's description of the weights: input_size (C, H, W), mean, std, num_classes, classifier."""
        timm = import_vision("timm")
        plain = self.name.partition(".")[0]
        require_name("timm", plain, timm.list_models())
        try:
            return timm.models.get_pretrained_cfg(self.name) or timm.models.PretrainedCfg()
        except RuntimeError as e:
            tags = ", ".join(t.partition(".")[2] for t in timm.list_pretrained(plain)) or "none"
            raise ValueError(
                f"model.name={self.name!r} names weights that timm does not have; valid after the dot: {tags}. Set model.name={plain}"
            ) from e
