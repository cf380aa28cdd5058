"""LoRATrainer: transformers' Trainer that optimizes LoRA and head only and checkpoints only them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from hf_lora._files import write_text
from hf_lora.adapters.card import CURVE, RunSummary, render_card, training_curve
from hf_lora.adapters.directory import adapter_info, save_adapter
from hf_lora.data.collation import quick_collator
from hf_lora.lora.inject import base_parameters, injection, trainable_parameter_count
from hf_lora.lora.quantized import trainable_if_quantized
from hf_lora.models.cpu import fast_training
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.first_token import first_token_only
from hf_lora.training.arguments import LoRATrainingArguments, class_weights, has_own_rates, parameter_groups
from hf_lora.training.batching import (
    EpochBatches,
    LongestFirst,
    by_length,
    metrics_in_order,
    order_of,
    restored,
    token_lengths,
    training_plan,
    with_batches,
)
from hf_lora.training.checkpointing import CheckpointingTrainer
from hf_lora.training.distributed import (
    check_equal,
    check_fsdp,
    keep_frozen_local,
    mean_shares,
    name_blocks,
    process_count,
)
from hf_lora.training.gradient_init import LoRAStart, awaits_start, start_lora
from hf_lora.training.preemption import saving_on_sigterm
from hf_lora.training.prefix_cache import PrefixCache, ordinary, prefix_cache
from hf_lora.version import __version__


class LoRATrainer(CheckpointingTrainer):
    """Trainer for a model with LoRA: the same signature, adapter-only checkpoints, strict loading.

    The optimizer holds LoRA, head and trained biases and nothing else. Losses under gradient accumulation
    and on several processes are means over examples (stock Trainer multiplies them for classifiers).
    `train_sampling_strategy="group_by_length"` is ours, see `batching`, in evaluation too. `args` may be plain
    TrainingArguments. Raises ValueError for a model without LoRA, and for an optimizer that misses a trained parameter.
    """

    facts: RunSummary
    compute_metrics: Any
    data_collator: Any
    optimizer: torch.optim.Optimizer | None
    label_smoother: Any

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        with trainable_if_quantized(model):
            super().__init__(model=model, args=args, **kwargs)
        injection(self.model)
        # `forward` takes **kwargs, from which Trainer concludes that the loss is divided by
        # `num_items_in_batch`; classification heads ignore it, and the loss would be counted once per step.
        self.model_accepts_loss_kwargs = False
        if kwargs.get("data_collator") is None:
            self.data_collator = quick_collator(self.data_collator)
        self.facts = RunSummary()
        self._replaying: Callable[[Any], AbstractContextManager[None]] = ordinary
        self.lora_start: LoRAStart | None = None
        self.predicting: Callable[[Any], AbstractContextManager[None]] = ordinary
        self.kept_prefix: PrefixCache | None = None
        self._shares: dict[int, float] = {}
        self._share = 1.0
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator.state.fsdp_plugin)
            name_blocks(self.model)
        self.class_weights = class_weights(
            getattr(self.args, "class_weights", None),
            self.train_dataset,
            self.model.config.num_labels,
            self.model.config.problem_type,
        )
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own with `acceleration`, without work for unread tokens, and with a cached prefix if asked for.

        resume_from_checkpoint: a directory, or True for the newest whole checkpoint in `args.output_dir`.
        SIGTERM saves a checkpoint and raises `hf_lora.training.preemption.Preempted`, which exits with 143.
        Raises ValueError for a checkpoint that is not whole, and where processes do not train the same.
        """
        resume = self.checkpoint_to_resume(resume_from_checkpoint)
        if process_count() > 1:
            self._check_processes()
            self._remember_base()
            keep_frozen_local(self.model)
        if resume is None and awaits_start(self):
            start_lora(self)
        if isinstance(self.args, LoRATrainingArguments):
            self.args.lora_settings = injection(self.model).config.to_dict()
        if resume is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Before the model is sharded; for the rest Trainer does so itself.
            self._load_adapter_checkpoint(resume)
        with (
            fast_training(self.model),
            first_token_only(self.model),
            prefix_cache(self) as self._replaying,
            saving_on_sigterm(self),
        ):
            try:
                return super().train(resume, *args, **kwargs)
            finally:
                self._replaying = ordinary

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Trainer's own; notes the share that each batch's mean loss has in the mean over the step's examples."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        # A loss function of the user's gets the number of all examples and divides by it itself.
        if self.compute_loss_func is None:
            shares = mean_shares([find_batch_size(batch) or 0 for batch in batches], self.args.device)
            self._shares = dict(zip(map(id, batches), shares, strict=True))
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own, with the outputs of a cached prefix in the place of the blocks that gave them."""
        self._share = self._shares.get(id(inputs), 1.0)
        inputs = self._prepare_inputs(inputs)
        try:
            with self._replaying(inputs):
                return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._share = 1.0

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; inside `filling_prefix` the output of the frozen prefix is kept."""
        inputs = self._prepare_inputs(inputs)
        with self.predicting(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches: of similar length, or within a budget of tokens, where the arguments say so."""
        plan = training_plan(self)
        if plan is None:
            return super().get_train_dataloader()
        args = self.args
        loader = self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size, SequentialSampler, is_training=True
        )
        seed = args.seed if args.data_seed is None else args.data_seed
        return with_batches(loader, EpochBatches(plan, seed, args.process_index))

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """Predictions, labels and metrics in the data set's order, whatever the order of the batches."""
        order = order_of(dataloader)
        if order is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        own = self.compute_metrics
        self.compute_metrics = metrics_in_order(own, order)
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = own
        return output._replace(
            predictions=restored(output.predictions, order), label_ids=restored(output.label_ids, order)
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each (learning rate, weight decay) that LoRA+, head rate and decay give."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and has_own_rates(self.args):
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = optimizer_class(
                parameter_groups(model or self.model, self.model, self.args, decayed), **kwargs
            )
        optimizer = super().create_optimizer(model)
        self._check_optimizer(optimizer)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own or the weighted loss, labels smoothed in training alone.

        In training it is multiplied so that gradients are of the mean over all examples of a step.
        """
        loss, outputs = self._loss(model, inputs, num_items_in_batch)
        loss = loss if self._share == 1.0 else loss * self._share
        return (loss, outputs) if return_outputs else loss

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        smoother = self.label_smoother
        # Smoothed labels are for learning; evaluation is of the labels that there are.
        self.label_smoother = smoother if model.training else None
        try:
            if self.class_weights is None:
                return super().compute_loss(model, inputs, True, items)
            return self._weighted_loss(model, inputs)
        finally:
            self.label_smoother = smoother

    def _weighted_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"]
        weights = cast(Tensor, self.class_weights).to(logits.device, torch.float32)
        if labels.is_floating_point():
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), weight=weights)
        else:
            smoothing = self.args.label_smoothing_factor if model.training else 0.0
            losses = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")
            # torch's own weight= divides by the weights in the batch: a rare example would rule the batch it is in.
            loss = (weights[labels] * losses).mean()
        return loss, outputs

    def create_model_card(self, **_: Any) -> None:
        """Write `README.md` into the output directory from what was measured."""
        if self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", self._card())

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if not by_length(self.args) or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        # Neither metrics of single batches nor lists of batches can be put into the data set's order.
        by_batch = self.args.batch_eval_metrics or not self.args.eval_do_concat_batches
        lengths = None if by_batch else token_lengths(eval_dataset)
        return SequentialSampler(eval_dataset) if lengths is None else LongestFirst(lengths)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        tokenizer = self.processing_class
        # The curve belongs to a finished run, whose results are known, and not to each checkpoint.
        curve = training_curve(self.state.log_history) if self.facts.metrics else None
        files: dict[str, str | bytes] = {"README.md": self._card(curve=curve is not None)}
        save_adapter(
            self.accelerator.unwrap_model(self.model),
            output_dir or self.args.output_dir,
            tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
            metrics=self.facts.metrics,
            files=files if curve is None else files | {CURVE: curve},
        )

    def _card(self, *, curve: bool = False) -> str:
        model = self.accelerator.unwrap_model(self.model)
        return render_card(
            adapter_info(model),
            injection(model).config,
            trainable_parameter_count(model),
            run=self.facts,
            args=self.args,
            log_history=self.state.log_history,
            curve=CURVE if curve else None,
        )

    def _check_processes(self) -> None:
        """Every process must start from the same weights, data and versions."""
        lengths = token_lengths(self.train_dataset)
        digest = (
            "of unknown length" if lengths is None else hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
        )
        facts = {
            "hf_lora, torch or transformers": f"{__version__}, {torch.__version__}, {transformers.__version__}",
            "base model": fingerprint(base_parameters(self.model)),
            "training set": digest,
        }
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Sharded, each process takes its part of its own; DDP sends the first process's to all.
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            facts["adapter and head at the start"] = fingerprint(trained)
        check_equal(facts)

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing trained may be missing from the optimizer: the head made after it is the classic case."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} trained parameters, first {missing[0]!r}; "
                "make the optimizer after inject_lora and load_classifier, or let LoRATrainer make it"
            )
