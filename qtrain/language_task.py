"""Language models: next-token loss, perplexity, and distance to the float model, without ever holding the logits of a whole text.

    perplexity = exp(-1/T * sum_t log p(x_t | x_<t))       over the T scored tokens (data modules mark the others with label -100)

Logits of a text are tokens x vocabulary: 16,000 tokens of a vocabulary of 150,000 are 9.6 GB. What is kept instead is the last hidden
state of each scored position (tokens x width, 130 times smaller here) and the model's output head; logits are made of them a few
hundred tokens at a time, used and dropped. Cross-entropy and KL are then exact, not sampled: every chunk sees the whole vocabulary.

Training does the same: the head and the loss of a chunk are computed, forgotten, and computed again in the backward pass
(`torch.utils.checkpoint`), so that the memory of a step does not grow with the vocabulary. Steps with few logits (`KEPT`) keep them.

    loss = (1 - w) * cross-entropy + w * T^2 * KL(teacher || student)          per scored token, natural logarithms

That a model's logits are its head on its last hidden state, but for the soft cap of Gemma 2, the scale of Cohere and that of Granite, is
checked on one sequence before anything is measured (`check`); a family that does otherwise is refused.

Shapes: B sequences, T tokens, S scored positions, H width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtrain.console import progress
from qtrain.evaluate import Batch
from qtrain.layers import FakeLinear, QuantizedLinear
from qtrain.tasks import Task

CHUNK = 1 << 25
"""Logits that exist at once, values: 128 MiB in float32."""
KEPT = 1 << 26
"""Logits of a training step that are kept for its backward pass, values: 256 MiB in float32; of larger steps they are computed again."""
IGNORED = -100
"""Label of a token that is not scored."""


class Head:
    """From hidden states to logits, as the model does it."""

    def __init__(self, model: Any) -> None:
        self.module: Any = model.get_output_embeddings()
        self.tensors: list[Tensor] = []
        """What it computes with, where that is not the module's own."""
        self.vocabulary = next(t.shape[0] for t in [*self.module.parameters(), *self.module.buffers()] if t.ndim == 2)
        config = model.config.get_text_config()
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)  # Cohere, Granite

    def fixed(self) -> Head:
        """The same head with its weight rounded or decoded once, not for every chunk; computes the same to the bit."""
        module: Any = self.module
        if isinstance(module, FakeLinear) and module.quantize_now():
            weight, bias = module.on_grid(module.weight, module.bias)
        elif isinstance(module, QuantizedLinear):
            weight, bias = module.quantized.decode(), module.bias
        elif type(module) is nn.Linear:  # the tensor stays where it is when the model moves on
            weight, bias = module.weight.detach(), module.bias
            bias = None if bias is None else bias.detach()
        else:
            return self
        twin = copy.copy(self)

        def linear(x: Tensor) -> Tensor:
            if getattr(module, "inverse_smoothing", None) is not None:
                x = x * module.inverse_smoothing
            if getattr(module, "activation_fake", None) is not None:
                x = module.activation_fake(x)
            return F.linear(x, weight.to(x.dtype), bias)

        twin.module, twin.tensors = linear, [weight]
        return twin

    @property
    def device(self) -> torch.device:
        """Where it is now: a model may move after its outputs were made."""
        return next(t.device for t in self.tensors or [*self.module.parameters(), *self.module.buffers()])

    def __call__(self, states_SH: Tensor) -> Tensor:
        """Logits, float32 [S, V]."""
        logits: Tensor = self.module(states_SH).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [B, T, H]."""
    states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states


def scored(states_BTH: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """States [S, H] of the positions whose next token is scored, and that token [S]."""
    labels_BT = labels_BT.to(states_BTH.device)  # another one where the model is spread over devices
    wanted = labels_BT[:, 1:] != IGNORED
    return states_BTH[:, :-1][wanted], labels_BT[:, 1:][wanted]


@dataclass
class LanguageOutputs:
    """What a model makes of a text: enough to give all its logits, a chunk at a time."""

    states_SH: Tensor
    """Hidden states at scored positions, on the CPU, in the order of the batches."""
    targets_S: Tensor
    """The tokens that follow, int64."""
    head: Head

    def __len__(self) -> int:
        return len(self.targets_S)

    @torch.inference_mode()
    def logits(self, rows: slice) -> Tensor:
        """Logits of some positions, float32 [S, V], where the head is now."""
        return self.head(self.states_SH[rows].to(self.head.device))

    def chunks(self) -> list[slice]:
        """Slices of rows whose logits fit into `CHUNK` values."""
        size = rows_at_once(self.head)
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]


def rows_at_once(head: Head) -> int:
    """Positions whose logits fit into `CHUNK` values."""
    return max(1, CHUNK // head.vocabulary)


@dataclass
class Score:
    """Running sums over scored tokens, float64, of one set of logits and optionally a reference."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    compared: bool = False

    def add(self, logits_SV: Tensor, targets_S: Tensor, reference_SV: Tensor | None = None) -> None:
        """Add some tokens; ``reference_SV`` are the float model's logits."""
        log_p = F.log_softmax(logits_SV, -1)
        self.tokens += len(targets_S)
        self.nll -= float(log_p.gather(-1, targets_S.to(log_p.device).unsqueeze(-1)).double().sum())
        if reference_SV is not None:
            self.compared = True
            self.same += int((logits_SV.argmax(-1) == reference_SV.argmax(-1)).sum())
            target = F.log_softmax(reference_SV, -1)
            self.kl += float(F.kl_div(log_p, target, reduction="none", log_target=True).sum(-1).double().sum())

    def metrics(self) -> dict[str, float]:
        """Perplexity, loss (nats per token), and agreement and KL (nats per token) where there was a reference."""
        loss = self.nll / self.tokens
        own = {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}
        return own | ({"agreement": self.same / self.tokens, "kl": self.kl / self.tokens} if self.compared else {})


class Comparison:
    """A runtime's logits on the evaluation text against training's, added sequence by sequence (`exporters/base.py`)."""

    def __init__(self, outputs: LanguageOutputs, batches: list[Batch], reference: LanguageOutputs | None) -> None:
        self.outputs, self.reference = outputs, reference
        self.sequences: list[list[int]] = []
        """Token ids, without padding."""
        self._positions: list[Tensor] = []
        self._offsets: list[int] = []
        offset = 0
        for inputs, labels in batches:
            for ids, row in zip(inputs["input_ids"], labels, strict=True):
                positions = (row[1:] != IGNORED).nonzero().flatten()
                if not len(positions):
                    continue
                self.sequences.append(ids[: int(positions[-1]) + 1].tolist())  # what follows the last scored position is not needed
                self._positions.append(positions)
                self._offsets.append(offset)
                offset += len(positions)
        self.training, self.runtime = Score(), Score()
        self.error = self.energy = self.max_abs = 0.0
        self.same = 0

    @torch.inference_mode()
    def add(self, sequence: int, start: int, logits: Any) -> None:
        """Compare ``logits`` (float32 [T, V], of the runtime) at positions start, start + 1, … of a sequence."""
        runtime = torch.as_tensor(logits)
        positions = self._positions[sequence]
        first = int(torch.searchsorted(positions, start))
        last = int(torch.searchsorted(positions, start + len(runtime)))
        step = rows_at_once(self.outputs.head)
        for low in range(first, last, step):
            high = min(low + step, last)
            rows = slice(self._offsets[sequence] + low, self._offsets[sequence] + high)
            self._add(rows, runtime[positions[low:high] - start])

    def _add(self, rows: slice, runtime_SV: Tensor) -> None:
        training = self.outputs.logits(rows).cpu()
        if training.shape != runtime_SV.shape:
            raise ValueError(f"the runtime gives logits {list(runtime_SV.shape)}, training {list(training.shape)}: the vocabularies differ")
        targets = self.outputs.targets_S[rows]
        reference = None if self.reference is None else self.reference.logits(rows).cpu()
        self.training.add(training, targets, reference)
        self.runtime.add(runtime_SV, targets, reference)
        difference = runtime_SV - training
        self.error += float(difference.square().sum(-1).double().sum())
        self.energy += float(training.square().sum(-1).double().sum())
        self.max_abs = max(self.max_abs, float(difference.abs().max()))
        self.same += int((training.argmax(-1) == runtime_SV.argmax(-1)).sum())

    def result(self) -> dict[str, Any]:
        """{"tokens", "nmse", "max_abs", "top1_agreement", "training": metrics, "runtime": metrics}."""
        tokens = self.training.tokens
        return {
            "tokens": tokens,
            "nmse": self.error / self.energy if self.energy else math.inf,
            "max_abs": self.max_abs,
            "top1_agreement": self.same / tokens,
            "training": self.training.metrics(),
            "runtime": self.runtime.metrics(),
        }


class Language(Task):
    """The next token, at every position."""

    name = "language"
    metrics = ("perplexity", "loss")
    lost = "perplexity_rise"

    @torch.inference_mode()
    def check(self, model: Any, batches: list[Batch]) -> None:
        """Raise where the logits are not the head on the last hidden state, or there is nothing to score.

        Raises:
            ValueError: see above; NaN in the logits of a float model names the weights.
        """
        if not any(bool((labels[:, 1:] != IGNORED).any()) for _, labels in batches):
            raise ValueError("the evaluation text has no token to score: it is empty or one token long. Set data.test=FILE to more text")
        model.eval()
        device = next(model.parameters()).device
        ids = batches[0][0]["input_ids"][:1, :8].to(device)
        logits = model(input_ids=ids).logits.float()
        ours = Head(model)(hidden(model, {"input_ids": ids})).to(logits.device)
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the float model's logits are not finite. Set model.dtype=float32, or model.path to an undamaged model")
        if not torch.allclose(logits, ours, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise ValueError(
                f"{type(model).__name__} computes its logits in another way than by its output head on the last hidden state, which "
                "this version does not follow. Set model.path to a model of a family such as llama, qwen2, qwen3, gemma2, gemma3 or phi3"
            )

    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module | None, weight: float, temperature: float) -> Tensor:
        """Cross-entropy per token, mixed with the KL divergence to the teacher.

        Raises:
            ValueError: if the batch has no token to learn from.
        """
        inputs, labels = batch
        states, targets = scored(hidden(model, inputs), labels)
        if not len(targets):
            raise ValueError("a batch has no token to learn from: all its labels are -100. Set data.train to longer texts")
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = scored(hidden(teacher, inputs), labels)[0]
        head, teacher_head = Head(model), None if teacher is None else Head(teacher)
        size = rows_at_once(head)

        def part(states_SH: Tensor, targets_S: Tensor, taught_SH: Tensor | None) -> Tensor:
            logits = head(states_SH)
            targets_S = targets_S.to(logits.device)
            total = logits.new_zeros(())
            if weight < 1 or teacher_head is None:
                total = total + (1 - weight if teacher_head is not None else 1.0) * F.cross_entropy(logits, targets_S, reduction="sum")
            if teacher_head is not None and taught_SH is not None:
                with torch.no_grad():
                    target = F.log_softmax(teacher_head(taught_SH) / temperature, -1)
                student = F.log_softmax(logits / temperature, -1)
                total = total + weight * temperature**2 * F.kl_div(student, target, reduction="sum", log_target=True)
            return total

        total = states.new_zeros((), dtype=torch.float32)
        again = len(targets) * head.vocabulary > KEPT
        for low in range(0, len(targets), size):
            rows = slice(low, low + size)
            given = states[rows], targets[rows], None if taught is None else taught[rows]
            total = total + (checkpoint(part, *given, use_reentrant=False) if again else part(*given)).to(total.device)
        return total / len(targets)

    def count(self, batch: Batch) -> int:
        """Scored tokens."""
        return int((batch[1][:, 1:] != IGNORED).sum())

    def validate(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Loss in nats per token."""
        return {"validation_loss": self.loss(model, batch, None, 0.0, 1.0)}, self.count(batch)

    @torch.inference_mode()
    def predict(self, model: Any, batches: list[Batch], what: str) -> LanguageOutputs:
        """Hidden states at the scored positions."""
        model.eval()
        device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
        states, targets = [], []
        for inputs, labels in progress(batches, what):
            some, following = scored(hidden(model, {n: v.to(device) for n, v in inputs.items()}), labels.to(device))
            states.append(some.cpu())
            targets.append(following.cpu())
        return LanguageOutputs(torch.cat(states), torch.cat(targets), Head(model).fixed())

    def measure(self, outputs: LanguageOutputs, batches: list[Batch], reference: LanguageOutputs | None = None) -> dict[str, float]:
        """Perplexity and loss; agreement and KL to the float model."""
        score = Score()
        with torch.inference_mode():
            for rows in progress(outputs.chunks(), "scoring" if len(outputs) > 2000 else ""):
                logits = outputs.logits(rows)
                float_logits = None if reference is None else reference.logits(rows).to(logits.device)
                score.add(logits, outputs.targets_S[rows], float_logits)
        return score.metrics()

    def difference(self, before: LanguageOutputs, after: LanguageOutputs) -> dict[str, Any]:
        """Of the hidden states, all of them, and of the logits of the first chunk, which see every row of the head."""
        rows = slice(0, rows_at_once(after.head))
        a, b = before.logits(rows), after.logits(rows)
        same = torch.equal(before.states_SH, after.states_SH) and torch.equal(a, b)
        x, y = before.states_SH.double(), after.states_SH.double()
        error = float((x - y).square().sum() / x.square().sum())
        worst = max(float((a - b).abs().max()), float((x - y).abs().max()))
        return {"logits": b.numel(), "hidden_states": y.numel(), "bit_exact": same, "nmse": error, "max_abs": worst}

    def comparison(self, outputs: LanguageOutputs, batches: list[Batch], reference: LanguageOutputs | None) -> Comparison:
        """See `Comparison`."""
        return Comparison(outputs, batches, reference)


TASK = Language()
