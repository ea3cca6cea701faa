"""Optimizers: the one that a device gets, those that it cannot have, and states that a checkpoint brings back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from qtrain.config import data_dir
from qtrain.fit import Fit, build, check
from qtrain.optimizers import adamw_auto
from tests.tiny_fit import language_fit, small_llama

CPU = torch.device("cpu")
CONF = {path.stem: path for path in sorted(data_dir("conf").glob("optimizer/*.yaml"))}


def node(name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.load(CONF[name]))
    return found


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", sorted(CONF))
def test_every_optimizer_trains_or_is_refused_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    config = SimpleNamespace(finetune=Fit(), quantizer=None, adapter=None, optimizer=node(name))
    if "8bit" in node(name)["_target_"]:
        with pytest.raises(
            ValueError, match=r"optimizer is bitsandbytes.optim.*needs CUDA.*trains on the CPU; valid here: adamw, adamw_auto"
        ):
            check(config, small_llama(), CPU)
        pytest.importorskip("bitsandbytes")
        check(config, small_llama(), torch.device("cuda"))
        config.finetune.epochs = 0
    else:
        model, before = small_llama(), weights(small_llama())
        language_fit(model, tmp_path, optimizer=build(node(name), "optimizer"))
        assert not torch.equal(weights(model), before)
    check(config, small_llama(), CPU)


def test_a_misspelt_optimizer_is_found_before_anything_is_trained() -> None:
    config = SimpleNamespace(finetune=Fit(), quantizer=None, adapter=None, optimizer={"_target_": "torch.optim.NoSuch", "_partial_": True})
    with pytest.raises(ValueError, match=r"optimizer names torch.optim.NoSuch"):
        check(config, small_llama(), CPU)


def test_auto_is_torchs_fused_adamw_on_a_cpu_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto, plain = small_llama(), small_llama()
    module = language_fit(auto, tmp_path, optimizer=build(node("adamw_auto"), "optimizer"))
    assert "optimizer: fused AdamW of torch: training is on the CPU" in capsys.readouterr().out
    language_fit(plain, tmp_path, optimizer=build(node("adamw"), "optimizer"))
    assert torch.equal(weights(auto), weights(plain))
    decayed, rest = module.trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.usefixtures("one_thread")
def test_eight_bit_states_come_back_from_a_checkpoint_and_decay_matrices_only(tmp_path: Path, name: str) -> None:
    """On a CPU, where bitsandbytes computes the same, only slowly."""
    optim = pytest.importorskip("bitsandbytes.optim")
    optimizer = partial(getattr(optim, name), weight_decay=0.5)
    whole, first, resumed = small_llama(), small_llama(), small_llama()
    module = language_fit(whole, tmp_path, optimizer=optimizer, checkpoint_every=0)
    states = {s["state1"].dtype for s in module.trainer.optimizers[0].state.values()}
    assert states == {torch.uint8, torch.float32}
    language_fit(first, tmp_path, optimizer=optimizer, max_steps=8, checkpoint_every=5)
    [folder] = (tmp_path / "steps").glob("step-*")
    assert folder.name == "step-00000005"
    language_fit(resumed, tmp_path, optimizer=optimizer, checkpoint_every=5, resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    still = nn.ParameterList([nn.Parameter(torch.ones(80, 80)), nn.Parameter(torch.ones(8000))])
    for p in still:
        p.grad = torch.zeros_like(p)
    optimizer([{"params": [still[0]]}, {"params": [still[1]], "weight_decay": 0.0}], lr=0.1).step()
    assert float(still[0].detach().max()) < 0.96 and torch.equal(still[1], torch.ones(8000))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw_auto", "adamw_8bit", "paged_adamw_8bit"])
def test_eight_bits_train_and_resume_on_a_gpu(tmp_path: Path, name: str) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    options: dict[str, Any] = {"optimizer": build(node(name), "optimizer"), "trainer": {"accelerator": "gpu"}}
    whole, resumed = small_llama(), small_llama()
    module = language_fit(whole, tmp_path, checkpoint_every=5, **options)
    assert isinstance(module.trainer.optimizers[0], optim.AdamW8bit if name == "adamw_8bit" else optim.PagedAdamW8bit)
    language_fit(resumed, tmp_path, checkpoint_every=5, resume=True, **options)
    torch.testing.assert_close(weights(whole).cpu(), weights(resumed).cpu(), rtol=1e-3, atol=1e-4)


def test_auto_takes_groups_without_a_parameter() -> None:
    p = nn.Parameter(torch.ones(3))
    made = adamw_auto([{"params": []}, {"params": [p], "weight_decay": 0.0}], lr=0.1, fused=False)
    assert isinstance(made, torch.optim.AdamW) and not made.defaults["fused"]
