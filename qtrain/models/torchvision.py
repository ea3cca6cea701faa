"""Image classifiers of torchvision, by name, where that package is installed (`pip install qtrain[vision]`).

`model.weights=DEFAULT` takes torchvision's best ImageNet weights, and with them their image size, mean and standard deviation; a
classifier of another number of classes is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtrain.image_models import ImageModel, classifiers, load_weights, read_weights
from qtrain.images import ImageSpec
from qtrain.registry import register
from qtrain.vision import import_vision, require_name

if TYPE_CHECKING:
    from torch import nn

AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Networks with classifiers halfway, which are only there for training from scratch: built without them."""


@register("model", "torchvision")
@dataclass
class TorchVision(ImageModel):
    """A torchvision classifier by name (`model.name=resnet18`); needs `pip install qtrain[vision]`."""

    name: str = "resnet18"
    """Name in torchvision.models."""
    weights: str | None = None
    """null: new, to be trained; DEFAULT: torchvision's best, downloaded; else a safetensors file or folder."""

    def processor(self) -> ImageSpec:
        """RGB images; size, mean and std are those of the published weights where they are asked for."""
        if self.weights != "DEFAULT":
            self._models()
            return ImageSpec("x", 3)
        preset = self._published().transforms()
        (side,) = preset.crop_size
        return ImageSpec("x", 3, (side, side), tuple(preset.mean), tuple(preset.std))

    def network(self, num_labels: int) -> nn.Module:
        """The network, with the weights that were asked for."""
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if self.name in AUXILIARY else {}
        model = self._models().get_model(self.name, weights=None, num_classes=num_labels, **options)
        if self.weights is None:
            self.new_parameters = [name for name, _ in model.named_parameters()]
            return model
        state, source = self._download() if self.weights == "DEFAULT" else read_weights(self.weights, "model.weights")
        state = {name: value for name, value in state.items() if not name.startswith(AUXILIARY.get(self.name, ()))}
        hint = f"Set model.name to the model that they are of, or model.weights=null for new weights of {self.name}"
        self.new_parameters = load_weights(model, state, source, classifiers(model, num_labels), hint)
        return model

    def _models(self) -> Any:
        models = import_vision("torchvision").models
        require_name("torchvision", self.name, models.list_models(module=models))
        return models

    def _published(self) -> Any:
        return self._models().get_model_weights(self.name).DEFAULT

    def _download(self) -> tuple[dict[str, Any], str]:
        weights = self._published()
        try:
            return weights.get_state_dict(progress=False, check_hash=True, weights_only=True), str(weights)
        except (OSError, RuntimeError) as e:  # URLError is an OSError; a wrong hash is a RuntimeError
            raise OSError(
                f"the weights {weights} could not be downloaded ({type(e).__name__}). Run once with a network, or set model.weights=FILE "
                "to a local safetensors file, or model.weights=null for new weights"
            ) from e
