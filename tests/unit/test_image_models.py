"""Image classifiers: the CIFAR ResNet as published, torchvision's and timm's by name, what is loaded, new, repeated and kept in float."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from qtrain import registry
from qtrain.data.digits import Digits
from qtrain.data.npz import Npz
from qtrain.image_models import ImageModel, classifiers
from qtrain.images import ImageSpec
from qtrain.models.cifar_resnet import DEPTHS, CifarResNet
from qtrain.models.timm import Timm
from qtrain.models.torchvision import TorchVision
from qtrain.resnet import Shortcut
from tests.conftest import ROOT, shared_data

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def saved(path: Path, source: ImageModel, labels: int = 10, **changes: Any) -> str:
    """A state dict of ``source``, random, with tensors replaced or (None) left out."""
    state = source.build(labels, seed=5).state_dict() | changes
    save_file({name: value.contiguous() for name, value in state.items() if value is not None}, path)
    return str(path)


# --- the CIFAR ResNet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_depth_and_size_are_those_of_the_paper(depth: int, millions: float) -> None:
    model = CifarResNet(depth=depth).build(10, seed=0)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_shortcut_without_parameters_takes_every_other_pixel_and_adds_zeros() -> None:
    x = images(2, 16, 8)
    out = Shortcut(16)(x)
    assert out.shape == (2, 32, 4, 4) and not list(Shortcut(16).parameters())
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 33), (4, 5)])
def test_any_size_and_number_of_channels(channels: int, size: int) -> None:
    model = CifarResNet(channels=channels).build(7, seed=0)
    assert model(pixel_values=images(3, channels, size)).shape == (3, 7)
    assert not model.training


def test_new_weights_are_drawn_from_the_seed_alone_and_all_listed() -> None:
    source = CifarResNet()
    before = torch.get_rng_state()
    first = source.build(10, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    same, other = source.build(10, seed=1).state_dict(), source.build(10, seed=2).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.state_dict()["conv1.weight"], other["conv1.weight"])
    assert source.new_parameters == [name for name, _ in first.named_parameters()]


@pytest.mark.parametrize("as_folder", [False, True])
def test_weights_of_a_file_are_loaded_as_float32(tmp_path: Path, as_folder: bool) -> None:
    file = tmp_path / "model.safetensors"
    saved(file, CifarResNet())
    state = {n: v.half() if v.is_floating_point() else v for n, v in load_file(file).items() if "num_batches" not in n}
    save_file(state, file)
    source = CifarResNet(path=str(tmp_path if as_folder else file))
    model = source.build(10, seed=0)
    assert source.new_parameters == []
    assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in state.items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_classifier_of_other_classes_is_replaced_and_listed(tmp_path: Path) -> None:
    source = CifarResNet(path=saved(tmp_path / "a.safetensors", CifarResNet()))
    model = source.build(4, seed=0)
    assert source.new_parameters == ["linear.bias", "linear.weight"]
    assert torch.equal(model.state_dict()["layer3.2.conv2.weight"], load_file(tmp_path / "a.safetensors")["layer3.2.conv2.weight"])
    assert torch.equal(model.state_dict()["linear.weight"], source.build(4, seed=0).state_dict()["linear.weight"])


@pytest.mark.parametrize(
    ("saved_as", "changes", "asked", "message"),
    [
        ({"depth": 32}, {}, {}, "do not fit the model: .* It is a network of depth 32 for 3 channels: set model.depth=32 model.channels=3"),
        ({}, {}, {"depth": 32}, "layer1.3.bn1.bias is missing in the file. It is a network of depth 20"),
        (
            {"channels": 1},
            {},
            {},
            r"conv1.weight has shape \[16, 1, 3, 3\] and the model \[16, 3, 3, 3\].*set model.depth=20 model.channels=1",
        ),
        ({}, {"bn1.running_mean": None}, {}, "1 tensors do not match, bn1.running_mean is missing in the file.*model.path=null"),
        ({}, {"fc.weight": torch.zeros(2)}, {}, "1 tensors do not match, fc.weight is not in the model"),
    ],
)
def test_weights_that_do_not_fit_say_what_to_type(
    tmp_path: Path, saved_as: dict[str, Any], changes: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path / "a.safetensors", CifarResNet(**saved_as), **changes)
    with pytest.raises(ValueError, match=message):
        CifarResNet(path=path, **asked).build(10, seed=0)


def test_files_that_are_no_weights_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere do not exist .*model.path=null for new weights"):
        CifarResNet(path="nowhere").build(10, seed=0)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors do not exist"):
        CifarResNet(path=str(tmp_path)).build(10, seed=0)
    file = Path(saved(tmp_path / "a.safetensors", CifarResNet()))
    for content in (file.read_bytes()[:-100], b"<html>" * 100, b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"are damaged .*model.path=FILE"):
            CifarResNet(path=str(file)).build(10, seed=0)
    (tmp_path / "a.pth").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=r"is a pickle, .* set model.path=.*a\.safetensors"):
        CifarResNet(path=str(tmp_path / "a.pth")).build(10, seed=0)


@pytest.mark.parametrize(
    ("options", "message"), [({"depth": 18}, f"valid: {', '.join(map(str, DEPTHS))}"), ({"channels": 0}, "at least 1")]
)
def test_bad_options_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarResNet(**options)


def test_label_names_must_fit() -> None:
    with pytest.raises(ValueError, match=r"1 label names \(only\) were given for 2 classes"):
        CifarResNet().build(2, seed=0, label_names=["only"])


def test_it_is_traced_by_fx_and_by_export_for_any_batch() -> None:
    model = CifarResNet().build(10, seed=0)
    x = images(5)
    with torch.inference_mode():
        expected = model(pixel_values=x)
        assert torch.equal(fx.symbolic_trace(model)(pixel_values=x), expected)
    dynamic = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": images(2)}, dynamic_shapes=dynamic)
    assert torch.allclose(program.module()(pixel_values=x), expected, atol=1e-5)


def test_the_published_weights_reach_their_published_accuracy() -> None:
    folder = shared_data()
    if not (folder / "resnet20-cifar10").is_dir() or not (folder / "cifar10").is_dir():
        pytest.skip("the ResNet-20 or CIFAR-10 is not here")
    source = CifarResNet(path=str(folder / "resnet20-cifar10"))
    data = Npz(path=str(folder / "cifar10" / "cifar10_subset.npz"), eval_batch_size=250, **IMAGENET).build(source.processor(), seed=0)
    model = source.build(len(data.label_names), seed=0)
    assert source.new_parameters == []
    with torch.inference_mode():
        right = sum(int((model(**inputs).argmax(1) == labels).sum()) for inputs, labels in data.test_dataloader())
    assert right / 5000 == pytest.approx(0.917, abs=0.004)  # 0.9173 on all 10,000 test images; here 0.9148 on half of them


def test_a_few_epochs_learn_the_digits() -> None:
    source = CifarResNet(channels=1)
    data = Digits().build(source.processor(), seed=0)
    model = source.build(10, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader: Any = data.train_dataloader()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=3 * len(loader))
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(**inputs), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(**inputs).argmax(1) == labels).sum()) for inputs, labels in data.test_dataloader())
    assert right / 180 > 0.95


# --- what all families have ---------------------------------------------------------------------------------------------------


def test_every_image_family_has_what_a_run_asks_for() -> None:
    for entry in registry.entries("model"):
        if issubclass(entry.cls, ImageModel):
            source = entry.cls()
            assert source.max_positions(nn.Linear(1, 1)) == source.vocabulary(nn.Linear(1, 1)) == 0
            assert source.new_parameters == []


def test_blocks_are_the_repeated_modules_in_order() -> None:
    source = CifarResNet(depth=32)
    assert source.blocks(source.build(10, seed=0)) == [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(5)]
    with pytest.raises(ValueError, match="has no repeated blocks"):
        source.blocks(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))


def test_nothing_stays_in_float_but_what_is_named() -> None:
    model = CifarResNet().build(10, seed=0)
    assert CifarResNet().always_float(model) == []
    assert CifarResNet(keep_float=["conv1", "linear"]).always_float(model) == ["conv1", "linear"]
    assert len(CifarResNet(keep_float=["layer1.*"]).always_float(model)) == 6
    with pytest.raises(ValueError, match=r"pattern 'bn1' matches none of the 20 .*convolution modules \(conv1, .*linear, …\)"):
        CifarResNet(keep_float=["bn1"]).always_float(model)


# --- torchvision and timm -----------------------------------------------------------------------------------------------------


@pytest.fixture
def package(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(name)
    return name


def family(package: str, name: str, **options: Any) -> ImageModel:
    return TorchVision(name=name, **options) if package == "torchvision" else Timm(name=name, **options)


MODELS = [
    ("torchvision", "resnet18", ["layer1.0", "layer4.1"], 8),
    ("torchvision", "mobilenet_v3_small", ["features.1", "features.11"], 11),
    ("torchvision", "squeezenet1_1", ["features.3", "features.12"], 8),
    ("timm", "resnet10t", ["layer1.0", "layer4.0"], 4),
    ("timm", "mobilenetv3_small_050", ["blocks.1.0", "blocks.4.2"], 10),
]


@pytest.mark.parametrize(("package", "name", "ends", "count"), MODELS, indirect=["package"])
def test_real_models_are_built_loaded_and_traced(package: str, name: str, ends: list[str], count: int, tmp_path: Path) -> None:
    source = family(package, name)
    spec = source.processor()
    assert (spec.input_name, spec.channels, spec.mean) == ("x", 3, None)
    before = torch.get_rng_state()
    model = source.build(5, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert source.new_parameters == [n for n, _ in model.named_parameters()]
    x = images(2, size=64)
    with torch.inference_mode():
        assert model(x=x).shape == (2, 5)
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    blocks = source.blocks(model)
    assert (blocks[0], blocks[-1], len(blocks)) == (*ends, count)
    assert source.always_float(model) == []

    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    option = "weights" if package == "torchvision" else "path"
    again = family(package, name, **{option: str(tmp_path)})
    with torch.inference_mode():
        assert torch.equal(again.build(5, seed=1)(x), model(x))
    assert again.new_parameters == []
    again.build(3, seed=1)
    assert len(again.new_parameters) == 2 and all(n in dict(model.named_parameters()) for n in again.new_parameters)
    other = family(package, "resnet34", **{option: str(tmp_path)})
    with pytest.raises(ValueError, match=rf"do not fit the model: .*Set model.name to the model that they are of, or model.{option}=null"):
        other.build(5, seed=0)


@pytest.mark.parametrize("package", ["torchvision", "timm"], indirect=True)
def test_a_name_that_does_not_exist_names_the_nearest(package: str) -> None:
    for call in (lambda s: s.processor(), lambda s: s.build(2, seed=0)):
        with pytest.raises(
            ValueError, match=rf"model.name='resnet19' is none of the \d+ classification models of {package}; .*Set model.name="
        ):
            call(family(package, "resnet19"))


@pytest.mark.parametrize("package", ["torchvision"], indirect=True)
def test_published_torchvision_weights_bring_size_mean_and_std(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    source = TorchVision(name="resnet18", weights="DEFAULT")
    assert source.processor() == ImageSpec("x", 3, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    published = torchvision.models.resnet18(weights=None).state_dict()
    weights: Any = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: published)
    model = source.build(5, seed=0)
    assert source.new_parameters == ["fc.bias", "fc.weight"]
    assert torch.equal(model.state_dict()["conv1.weight"], published["conv1.weight"])
    source.build(1000, seed=0)
    assert source.new_parameters == []

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to https://somewhere")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(OSError, match=r"could not be downloaded .*model.weights=FILE") as error:
        source.build(5, seed=0)
    assert "://" not in str(error.value)


@pytest.mark.parametrize("package", ["torchvision"], indirect=True)
def test_auxiliary_classifiers_are_left_out(package: str, tmp_path: Path) -> None:
    source = TorchVision(name="googlenet")
    model = source.build(5, seed=0).train()
    assert model(images(2, size=64)).shape == (2, 5)
    state = {n: v.contiguous() for n, v in model.state_dict().items()} | {"aux1.fc2.bias": torch.zeros(5)}
    save_file(state, tmp_path / "a.safetensors")
    TorchVision(name="googlenet", weights=str(tmp_path / "a.safetensors")).build(5, seed=0)


@pytest.mark.parametrize("package", ["timm"], indirect=True)
def test_published_timm_weights_bring_size_mean_and_std(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    spec = Timm(name="resnet10t.c3_in1k", pretrained=True).processor()
    assert (spec.size, spec.mean) == ((176, 176), (0.485, 0.456, 0.406))
    assert Timm(name="resnet10t", channels=1).processor() == ImageSpec("x", 1)
    assert Timm(name="vit_tiny_patch16_224").processor().size == (224, 224)  # takes no other
    assert Timm(name="resnet10t", channels=1).build(3, seed=0)(images(2, 1)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"weights that timm does not have; valid after the dot: c3_in1k. Set model.name=resnet10t"):
        Timm(name="resnet10t.nobody").processor()
    with pytest.raises(ValueError, match=r"two sources of weights. Set model.pretrained=false"):
        Timm(pretrained=True, path="a")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    source = Timm(name="resnet10t", pretrained=True)
    source.build(5, seed=0)
    assert source.new_parameters == ["fc.bias", "fc.weight"]
    source.build(1000, seed=0)
    assert source.new_parameters == []

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("couldn't connect to https://somewhere")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"could not be downloaded .*model.path=FILE") as error:
        source.build(5, seed=0)
    assert "://" not in str(error.value)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_an_absent_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(module: str, *args: Any) -> Any:
        if module == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ValueError, match=rf"model={name} needs the package {name}.*pip install qtrain\[vision\]"):
        family(name, "resnet18").processor()


def test_a_torchvision_that_does_not_fit_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(module: str, *args: Any) -> Any:
        if module == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(module, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(
        ValueError, match=r"does not fit torch .*: operator torchvision::nms does not exist. Install the two that belong together"
    ):
        TorchVision().build(2, seed=0)


MISFIT = """
import sys
import torch
from qtrain.vision import mend_torchvision
mended = mend_torchvision()
assert "torchvision" not in sys.modules
import torchvision, lightning.pytorch
assert not mend_torchvision()
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    raised = False
except NotImplementedError:
    raised = True
assert raised == mended, (raised, mended)
"""


def test_lightning_is_imported_whatever_torchvision_is_installed() -> None:
    """With compiled operators that do not load, they are declared and raise when called; with a whole one nothing is touched."""
    pytest.importorskip("torchvision")
    done = subprocess.run([sys.executable, "-c", MISFIT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_classifier_is_the_last_module_with_an_output_per_class() -> None:
    assert classifiers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)), 4) == ["2"]
    assert classifiers(nn.Sequential(nn.Linear(3, 4)), 7) == []
