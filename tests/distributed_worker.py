"""One process's part of a training run: `python distributed_worker.py ORDER`, alone or under `accelerate launch`.

ORDER is JSON: folder, batch, accumulated. The first process writes result.json, steps.safetensors and the adapter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, inject_lora
from hf_lora.training.distributed import gathered

STEPS, EXAMPLES, EVALUATED = 10, 100, 37


class Counter(TorchDispatchMode):
    """Adds up the bytes that each kind of collective is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            # The result comes first where there is one, then what is sent.
            sent = args[1] if name.startswith(("allgather", "reduce_scatter")) else args[0]
            tensors = [t for t in _flat(sent) if isinstance(t, torch.Tensor)]
            self.sent[name] = self.sent.get(name, 0) + sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


class Watch(TrainerCallback):
    """Keeps the gradients of every step, whole, and the bytes of them that DDP sends."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.ddp_bytes: list[int] = []
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        wrapped = self.trainer.model_wrapped
        if hasattr(wrapped, "register_comm_hook"):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def counted(state: Any, bucket: Any) -> Any:
                self.ddp_bytes[-1] += bucket.buffer().nbytes
                return allreduce_hook(state, bucket)

            counted.__annotations__ = {}  # DDP compares them with types, and here they are strings
            wrapped.register_comm_hook(None, counted)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.ddp_bytes.append(0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        named = sorted((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for _, g in named if g is not None]
        self.gradients.append(torch.cat([g.detach().reshape(-1) for g in whole]))


def data(count: int, seed: int) -> Dataset:
    """Random tokens of 4 to 20 in a row; the label is whether the first is in the upper half."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 21, (1,), generator=generator))
        rows.append(torch.randint(5, 200, (length,), generator=generator).tolist())
    masks = [[1] * len(row) for row in rows]
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": masks, "labels": [int(row[0] > 102) for row in rows]}
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def train(folder: str, batch: int, accumulated: int) -> None:
    """Train a model without dropout in fp32, predict, and write what is compared."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=200,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    inject_lora(model, LoRAConfig(rank=4))
    # B is zero at the start, and so would be the gradients of A.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.02)
    arguments = LoRATrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=accumulated,
        train_sampling_strategy="group_by_length",
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    watch = Watch()
    trainer = LoRATrainer(
        model=model,
        args=arguments,
        train_dataset=data(EXAMPLES, 1),
        eval_dataset=data(EVALUATED, 2),
        data_collator=collate,
        callbacks=[watch],
    )
    watch.trainer = trainer
    with Counter() as counter:
        trainer.train()
    predicted = trainer.predict(data(EVALUATED, 2)).predictions
    trainer.save_model()
    plain = trainer.accelerator.unwrap_model(trainer.model)
    with gathered(plain):
        trained = sum(p.nbytes for p in plain.parameters() if p.requires_grad)
    if not trainer.is_world_process_zero():
        return
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tensors = {
        "losses": torch.tensor(losses),
        "gradients": torch.stack(watch.gradients),
        "logits": torch.from_numpy(predicted).contiguous(),
    }
    save_file(tensors, Path(folder) / "steps.safetensors")
    result = {
        "ranks": arguments.world_size,
        "trained_bytes": trained,
        "frozen_bytes": sum(p.nbytes for p in plain.parameters() if not p.requires_grad),
        "gradient_bytes": max(watch.ddp_bytes, default=0),
        "collectives": {name: total // STEPS for name, total in counter.sent.items()},
    }
    (Path(folder) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
