"""What the training benchmarks compare: one classifier under hf_lora, under peft, fully trained, and the bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from data_sets import BASE
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer

from hf_lora import LoRAConfig, inject_lora
from hf_lora.lora.head import cast_inputs
from hf_lora.models.cpu import fast_training
from hf_lora.models.first_token import first_token_only
from hf_lora.models.loading import load_base
from hf_lora.tasks.metrics import first_output

SHAPES = {
    "minilm": {
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-base": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}


@dataclass(frozen=True)
class Case:
    """One training step: a shape, how precisely, on how many tokens, and what is adapted (top `layers`; None: all)."""

    shape: str
    precision: str
    dropout: float
    batch: int
    length: int
    rank: int = 8
    layers: int | None = None

    @property
    def adapted(self) -> tuple[int, ...]:
        """The adapted blocks, counted from 0."""
        total = SHAPES[self.shape]["num_hidden_layers"]
        return tuple(range(total - (self.layers or total), total))

    def model(self, dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
        """The random classifier, its frozen part in `dtype`."""
        torch.manual_seed(0)
        config = BertConfig(
            **SHAPES[self.shape],
            num_labels=5,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )
        model = BertForSequenceClassification(config)
        if dtype != torch.float32:
            model.to(dtype).classifier.float()
            cast_inputs(model, ["classifier"])
        return model.train()

    def inputs(self) -> dict[str, Tensor]:
        """A batch without padding."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1000, 30000, (self.batch, self.length), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(0, 5, (self.batch,), generator=generator),
        }


class Step:
    """Forward, backward and the gradients set to None: what a training step costs beside a small optimizer.

    inside: contexts that a trainer enters once for a whole run; they are entered for each step, outside of its time.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        *,
        autocast: bool = False,
        inside: Sequence[Callable[[nn.Module], AbstractContextManager[Any]]] = (),
    ) -> None:
        self.model, self.inputs, self.autocast, self.inside = model, inputs, autocast, inside

    def __call__(self) -> float:
        """One step; returns its seconds."""
        with ExitStack() as stack:
            for context in self.inside:
                stack.enter_context(context(self.model))
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                self.loss = self.model(**self.inputs).loss
            self.loss.backward()
            self.model.zero_grad()
            return time.perf_counter() - start


def hf_lora_step(case: Case) -> Step:
    """Our layers on a base in the case's precision, as the trainer runs them."""
    return _hf_lora(case, (fast_training, first_token_only))


def whole_block_step(case: Case) -> Step:
    """The same without sparing the last block the tokens that the classifier does not read."""
    return _hf_lora(case, (fast_training,))


def _hf_lora(case: Case, inside: Sequence[Callable[[nn.Module], AbstractContextManager[Any]]]) -> Step:
    model = case.model(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    inject_lora(model, LoRAConfig(rank=case.rank, dropout=case.dropout, layers=case.adapted))
    return Step(model, case.inputs(), inside=inside)


def peft_config(**options: Any) -> LoraConfig:
    """peft's configuration for BERT's q, k, v and o under a classification head."""
    targets = ["query", "key", "value", "attention.output.dense"]
    return LoraConfig(target_modules=targets, task_type=TaskType.SEQ_CLS, **options)


def stock_model(labels: Sequence[str]) -> PreTrainedModel:
    """MiniLM with transformers' own head, nothing adapted and nothing frozen."""
    return load_base(BASE, labels)[0]


def stock_peft(labels: Sequence[str], *, rank: int, alpha: float, dropout: float) -> Any:
    """MiniLM under peft."""
    return get_peft_model(stock_model(labels), peft_config(r=rank, lora_alpha=alpha, lora_dropout=dropout))


def accuracy_on(trainer: Trainer, dataset: Any) -> float:
    """The share of right answers."""
    output = trainer.predict(dataset)
    return float(np.mean(first_output(output.predictions).argmax(-1) == output.label_ids))


def peft_step(case: Case) -> Step:
    """peft as its users run it: fp32 weights, and autocast for bf16."""
    config = peft_config(
        r=case.rank, lora_alpha=16, lora_dropout=case.dropout, layers_to_transform=list(case.adapted)
    )
    model = get_peft_model(case.model(), config).train()
    return Step(model, case.inputs(), autocast=case.precision == "bf16")


def bound_step(case: Case) -> Step:
    """The frozen network and the gradients of its activations, from the lowest adapted block up: no adapters."""
    model = case.model(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    model.requires_grad_(False)
    first = case.adapted[0]
    below = model.bert.encoder.layer[first - 1] if first else model.bert.embeddings
    below.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    return Step(model, case.inputs())


STEPS = {"hf_lora": hf_lora_step, "whole block": whole_block_step, "peft": peft_step, "bound": bound_step}
