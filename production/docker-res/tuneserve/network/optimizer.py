"""AdamW over fp32 master weights, laid out so that a step touches no more memory than it must.

Dense weights lie in one flat fp32 tensor with one flat gradient; the model computes with a bf16 copy, or with the
masters themselves. The word embeddings, often half of all weights, are updated in those rows alone that a step reads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from transformers import PreTrainedModel

from tuneserve.hardware import Precision
from tuneserve.network.forward import NUMBER_FORMAT

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
HEAD_RATE = 3.0
"""How many times faster than the body what follows it learns: its weights are new, or were trained for another task."""

SETTLED_AT_ONCE = 8192
"""Rows of the word embeddings that are brought up to date together, which bounds the memory it takes."""

Reduce = Callable[[torch.Tensor], None]
"""Adds up a tensor over all processes, in place."""


class Optimizer:
    """Trains `model` in place: `begin`, then `collect` after each backward pass, then `step`.

    Matrices decay, norms, biases and word embeddings do not (Loshchilov and Hutter, 1711.05101); the head learns faster
    than the body while both are trained. Used as a context: inside, the
    model computes in the number format of `precision`; afterwards it has its fp32 weights.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, max_norm: float, precision: Precision) -> None:
        self.model, self.max_norm = model, max_norm
        dtype = NUMBER_FORMAT[precision]
        self.rows = Rows.of(model, dtype)  # None: every row is updated at every step, as by plain AdamW
        groups = _group(model, learning_rate)
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self.masters = torch.cat([parameter.detach().float().flatten() for parameter in self.parameters])
        self.gradient = torch.zeros_like(self.masters)
        self.weights = self.masters if dtype == torch.float32 else self.masters.to(dtype)
        self.gradients = _views(self.gradient, self.parameters)
        for parameter, view in zip(self.parameters, _views(self.weights, self.parameters), strict=True):
            parameter.data = view
        self._frozen = [(one, one.data) for one in model.parameters() if not one.requires_grad]
        for parameter, _ in self._frozen:
            if self.rows is None or parameter is not self.rows.weight:
                parameter.data = parameter.data.to(dtype)

        start, parts = 0, list[dict[str, Any]]()
        for (rate, decay), group in groups.items():
            size = sum(parameter.numel() for parameter in group)
            part = self.masters[start : start + size]
            part.grad = self.gradient[start : start + size]
            parts.append({"params": [part], "lr": rate, "peak": rate, "weight_decay": decay})
            start += size
        self.adamw = AdamW(parts, betas=BETAS, eps=EPSILON, fused=True)
        for one in parts:  # AdamW would make these at its first step; a resumed run writes to them before
            part = one["params"][0]
            self.adamw.state[part] = {
                "step": torch.zeros((), device=part.device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }
        self.learning_rate = learning_rate
        self._collected = False

    def begin(self, words: torch.Tensor) -> None:
        """Start a step that reads these token ids, each once and in order; those of all processes and parts."""
        self._collected = False
        if self.rows is not None:
            self.rows.begin(words)

    def collect(self) -> None:
        """Take the gradients that a backward pass left in the model."""
        views, found = [], []
        for view, parameter in zip(self.gradients, self.parameters, strict=True):
            if parameter.grad is not None:
                views.append(view)
                found.append(parameter.grad)
                parameter.grad = None
        if self._collected:
            torch._foreach_add_(views, found)
        else:
            if len(found) < len(self.parameters):
                self.gradient.zero_()
            torch._foreach_copy_(views, found)
        self._collected = True

    def drop(self) -> None:
        """Forget a step half made."""
        for parameter in self.parameters:
            parameter.grad = None
        self.begin(torch.empty(0, dtype=torch.int64, device=self.gradient.device))

    def step(self, share: float, reduce: Reduce = lambda tensor: None) -> float:
        """Update the weights at `share` of the peak rates; return the gradient's norm before it was clipped."""
        if not self._collected:  # this process had no text of the batch
            self.gradient.zero_()
        reduce(self.gradient)
        squares = self.gradient.norm() ** 2
        if self.rows is not None:
            reduce(self.rows.gradient)
            squares = squares + self.rows.gradient.norm() ** 2
        norm = squares.sqrt()
        divisor = (norm / self.max_norm).clamp(min=1.0)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * share
        # The fused kernel divides by grad_scale while it reads: clipping costs no pass of its own over the gradient.
        self.adamw.grad_scale, self.adamw.found_inf = divisor, torch.zeros_like(divisor)  # type: ignore[attr-defined]
        self.adamw.step()
        self.refresh()
        if self.rows is not None:
            self.rows.step(self.learning_rate * share, divisor)
        return float(norm)

    def settle(self) -> None:
        """Bring every row of the word embeddings up to date, as at the end of an epoch."""
        if self.rows is not None:
            for words in torch.arange(len(self.rows.weight), device=self.gradient.device).split(SETTLED_AT_ONCE):
                self.rows.catch_up(words)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors in which all progress lies, by name; after writing to them, call `refresh`."""
        tensors = {"masters": self.masters}
        for index, group in enumerate(self.adamw.param_groups):
            state = self.adamw.state[group["params"][0]]
            tensors |= {f"adamw.{index}.{name}": value for name, value in state.items()}
        return tensors | ({} if self.rows is None else self.rows.tensors())

    def weights_alone(self) -> dict[str, torch.Tensor]:
        """Those of the tensors that a prediction depends on."""
        return {name: tensor for name, tensor in self.tensors().items() if name in ("masters", "rows.table")}

    def refresh(self) -> None:
        """Let the model compute with what was written to the tensors."""
        if self.weights is not self.masters:
            self.weights.copy_(self.masters)

    def __enter__(self) -> "Optimizer":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the model with its fp32 weights."""
        for parameter, view in zip(self.parameters, _views(self.masters, self.parameters), strict=True):
            parameter.data = view.clone()
        for parameter, before in self._frozen:
            if self.rows is None or parameter is not self.rows.weight:
                parameter.data = before
        if self.rows is not None and isinstance(self.model, PreTrainedModel):
            self.rows.finish(self.model)


class Rows(nn.Module):
    """The word embeddings while they are trained: a step gathers the rows it reads, and only they are updated.

    On two cores in bf16 this trains 1.07 times as many tokens/s with MiniLM's 30,000 words and 2.84 times as many with
    a vocabulary of 250,000, to equal accuracy (docs/decisions/0004-training-engine.md).

    AdamW goes on moving a row after its last gradient, by momentum; such a row is brought up to date when it is next
    read, by the sum of the geometric series that those steps make. So the rows learn as if all were updated every time,
    but for the learning rate, which is held during the steps caught up with. There is no weight decay, and padding is
    not learned.

    `weight` and the moments are fp32 [words, channels]; `forward` gives the model's number format.
    """

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding, self.weight, self.dtype = embedding, embedding.weight, dtype
        self.weight.requires_grad = False
        words, device = len(self.weight), self.weight.device
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.updated = torch.zeros(words, dtype=torch.int64, device=device)  # the step up to which a row is up to date
        self.rate = torch.zeros(words, device=device)  # the learning rate of its last update
        self.steps = torch.zeros((), dtype=torch.int64)
        self._rows = self._table = torch.empty(0)

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "Rows | None":
        """Replace the model's word embeddings by one; None where they are frozen or of an unusual kind."""
        if not isinstance(model, PreTrainedModel):
            return None
        embedding = model.get_input_embeddings()
        if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad:
            return None
        if sum(one is embedding.weight for _, one in model.named_parameters(remove_duplicate=False)) > 1:
            return None
        rows = cls(embedding, dtype)
        model.set_input_embeddings(rows)
        return rows

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of token ids, [..., channels]."""
        if len(self._rows) == 0:
            return functional.embedding(input_ids, self.weight).to(self.dtype)
        index = torch.searchsorted(self._rows, input_ids)
        if self.embedding.padding_idx is not None:  # convolutions look at padding: it has to be its own
            index = torch.where(input_ids == self.embedding.padding_idx, len(self._rows), index)
        index.clamp_(max=len(self._table) - 1)
        return functional.embedding(index, self._table).to(self.dtype)

    def begin(self, words: torch.Tensor) -> None:
        """Gather the rows of these ids, each given once and in order; without ids, read from the whole table again."""
        self._rows = words
        self.catch_up(words)
        if len(words) and self.embedding.padding_idx is not None:
            words = functional.pad(words, (0, 1), value=self.embedding.padding_idx)
        self._table = self.weight[words].detach().requires_grad_()
        self._table.grad = torch.zeros_like(self._table)

    @torch.no_grad()
    def catch_up(self, rows: torch.Tensor) -> None:
        """Move rows as far as their momentum has carried them since their last update."""
        first, second = BETAS
        updated = self.updated[rows].double()
        missed = int(self.steps) - updated
        ratio = first / second**0.5
        series = ratio * (1 - ratio**missed) / (1 - ratio)
        size = (self.rate[rows] * series / (1 - first ** (updated + 1))).float()[:, None]
        root = (self.exp_avg_sq[rows] / (1 - second ** (updated + 1)).float()[:, None]).sqrt_().add_(EPSILON)
        self.weight[rows] -= size * self.exp_avg[rows] / root
        self.exp_avg[rows] *= (first**missed).float()[:, None]
        self.exp_avg_sq[rows] *= (second**missed).float()[:, None]
        self.updated[rows] = int(self.steps)

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient of the gathered rows."""
        assert self._table.grad is not None
        return self._table.grad[: len(self._rows)]

    @torch.no_grad()
    def step(self, learning_rate: float, divisor: torch.Tensor) -> None:
        """Update the gathered rows, their gradient divided by `divisor`."""
        self.steps += 1
        steps = int(self.steps)
        rows, gradient = self._rows, self.gradient / divisor
        first, second = BETAS
        exp_avg = self.exp_avg[rows].lerp_(gradient, 1 - first)
        exp_avg_sq = self.exp_avg_sq[rows].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.exp_avg[rows], self.exp_avg_sq[rows] = exp_avg, exp_avg_sq
        self.updated[rows], self.rate[rows] = steps, learning_rate
        root = (exp_avg_sq / (1 - second**steps)).sqrt_().add_(EPSILON)
        self.weight[rows] = self._table[: len(rows)].addcdiv(exp_avg, root, value=-learning_rate / (1 - first**steps))
        self.begin(rows[:0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors in which its progress lies, by name."""
        return {
            "rows.table": self.weight.detach(),
            "rows.exp_avg": self.exp_avg,
            "rows.exp_avg_sq": self.exp_avg_sq,
            "rows.updated": self.updated,
            "rows.rate": self.rate,
            "rows.steps": self.steps,
        }

    def finish(self, model: PreTrainedModel) -> None:
        """Give the model its own embedding back."""
        self.weight.requires_grad = True
        model.set_input_embeddings(self.embedding)


def body_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """What leads up to the last hidden state, by the model's names; pooler and classifier come after it."""
    prefix = f"{model.base_model_prefix}."
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")
    ]


def _group(model: nn.Module, learning_rate: float) -> dict[tuple[float, float], list[nn.Parameter]]:
    """The parameters to train, by their peak rate and weight decay."""
    body = set()
    if isinstance(model, PreTrainedModel):
        body = {name for name, parameter in body_parameters(model) if parameter.requires_grad}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = learning_rate * (HEAD_RATE if body and name not in body else 1.0)
            decay = WEIGHT_DECAY if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return groups


def _views(flat: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Parts of a flat tensor in the parameters' shapes, in their order."""
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
