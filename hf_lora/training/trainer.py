"""LoRATrainer: transformers' Trainer that optimizes LoRA and head only and checkpoints only them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from hf_lora.adapters.card import RunSummary
from hf_lora.adapters.directory import adapter_info
from hf_lora.data.collation import labels_of, quick_collator
from hf_lora.lora.inject import injection
from hf_lora.models.cpu import fast_training
from hf_lora.models.first_token import first_token_only
from hf_lora.models.reconcile import reconcile
from hf_lora.prefix.cache import PrefixCache, open_prefix_cache
from hf_lora.training import _trainer_hooks as hooks
from hf_lora.training import batching, distributed
from hf_lora.training.arguments import (
    LoRATrainingArguments,
    check_arguments,
    check_callbacks,
    check_metric,
    class_weights,
    has_own_rates,
    parameter_groups,
)
from hf_lora.training.checkpointing import CheckpointingTrainer
from hf_lora.training.checkpoints import saving_on_sigterm
from hf_lora.training.gradient_init import LoRAStart, awaits_start, start_lora


class LoRATrainer(CheckpointingTrainer):
    """Trainer for a model with LoRA: the same signature, adapter-only checkpoints, strict loading.

    The optimizer holds LoRA, head and trained biases and nothing else. Losses under gradient accumulation
    and on several processes are means over examples (stock Trainer multiplies them for classifiers).
    `train_sampling_strategy="group_by_length"` is ours, see `batching`, in evaluation too. `args` may be plain
    TrainingArguments. Raises ValueError for a model without LoRA, or with it merged, and for an optimizer that misses a
    trained parameter.

    facts: what the card tells besides the training. lora_start: how A and B began, once `start_lora` has run.
    starts: what `start_head` and `start_lora` do, once more for every model that `model_init` makes.
    prefix: the cache of the frozen blocks' output, while there is one.
    """

    class_weights: Tensor | None
    compute_metrics: Any
    data_collator: Any
    label_smoother: Any
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if args is not None:
            check_arguments(args)
        with hooks.trainable_if_quantized(model):
            super().__init__(model=model, args=args, **kwargs)
        distributed.check_met()
        hooks.check_acting(self.model)
        self._reconcile()
        check_callbacks(self.args, self.callback_handler.callbacks)
        if self.compute_metrics is None and not isinstance(self.eval_dataset, dict):
            check_metric(self.args, ())
        # Trainer concludes from the **kwargs of `forward` that the loss is divided by `num_items_in_batch`;
        # classification heads ignore it, and the loss would be counted once per step.
        self.model_accepts_loss_kwargs = False
        if kwargs.get("data_collator") is None:
            self.data_collator = quick_collator(self.data_collator)
        self.facts = RunSummary()
        self.lora_start: LoRAStart | None = None
        self.starts: dict[str, Callable[[], Any]] = {}
        self.prefix: PrefixCache | None = None
        self._filling_prefix = self._unlabelled = False
        self._shares: dict[int, float] = {}
        self._share = 1.0
        if self.is_fsdp_enabled:
            distributed.check_fsdp(self.accelerator.state.fsdp_plugin)
            distributed.name_blocks(self.model)
        weights, config = getattr(self.args, "class_weights", None), self.model.config
        labels = partial(labels_of, self.train_dataset, self.collated)
        self.class_weights = class_weights(weights, labels, config.num_labels, config.problem_type)
        if self.optimizer is not None and not self._is_sharded:
            hooks.check_optimizer(self.model, self.optimizer)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        *args: Any,
        allow_changed: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trainer's own, faster on CPUs, without work for unread tokens, and with a cached prefix if asked for.

        resume_from_checkpoint: a directory, or True for the newest whole checkpoint in `args.output_dir`.
        trial: of `hyperparameter_search`. A model of `model_init` is made anew, and starts as the one before it did.
        allow_changed: what may differ from its run, as the option of that name, which it adds to.
        SIGTERM saves a checkpoint and raises `hf_lora.training.checkpoints.Preempted`, which exits with 143.
        Raises ValueError for a checkpoint that is not whole or of another run, naming what differs, and where processes
        do not train the same.
        """
        resume = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.model_init is not None:
            self._begin_anew(trial, started=resume is None)
        hooks.check_acting(self.model)
        if distributed.process_count() > 1:
            lengths = batching.token_lengths(self.train_dataset)
            distributed.check_processes(self.model, lengths, self._is_sharded)
            # The digest of the pretrained weights is taken while they are whole: sharded, no process has them all.
            injection(self.model).info = adapter_info(self.model)
            distributed.keep_frozen_local(self.model)
        self.compare_with(resume, allow_changed)
        if resume is None and awaits_start(self):
            start_lora(self)
        if isinstance(self.args, LoRATrainingArguments):
            self.args.lora_settings = injection(self.model).config.to_dict()
        if resume is not None and self._is_sharded:
            # Before the model is sharded; otherwise Trainer does so itself.
            self._load_from_checkpoint(resume)
        faster = fast_training(self.model)
        # The model has been made: Trainer would make another one.
        made = hooks.replaced(self, "model_init", None)
        with made, faster, first_token_only(self.model), self._caching_prefix(), saving_on_sigterm(self):
            return super().train(resume, trial, *args, **kwargs)

    def _begin_anew(self, trial: Any, started: bool) -> None:
        """A new model of `model_init`, as Trainer makes one for every training, and its start."""
        set_seed(self.args.seed)
        self.model = self.model_wrapped = self.call_model_init(trial)
        self.optimizer = self.lr_scheduler = self.lora_start = self.prefix = None
        if self.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)
        self._reconcile()
        for start in self.starts.values() if started else ():
            start()

    def _reconcile(self) -> None:
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            reconcile(self.model, self.processing_class)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Trainer's own; notes the share that each batch's mean loss has in the mean over the step's examples."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        # A loss function of the user's gets the number of all examples and divides by it itself.
        if self.compute_loss_func is None:
            sizes = [find_batch_size(batch) or 0 for batch in batches]
            shares = distributed.mean_shares(sizes, self.args.device)
            self._shares = dict(zip(map(id, batches), shares, strict=True))
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own, with the outputs of a cached prefix in the place of the blocks that gave them."""
        share, inputs = self._shares.get(id(inputs), 1.0), self._prepare_inputs(inputs)
        with hooks.replaced(self, "_share", share), self._replaying(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; inside `filling_prefix` the output of the frozen prefix is kept."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None) if self._unlabelled else None
        with self._replaying(inputs, self._filling_prefix):
            loss, logits, given = super().prediction_step(model, inputs, *args, **kwargs)
        return loss, logits, given if labels is None else labels

    def collated(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Examples of any data set as a batch on the device, without the columns that Trainer leaves out."""
        batch = self._get_collator_with_removed_columns(self.data_collator)(list(rows))
        return self._prepare_inputs(batch)

    @contextmanager
    def predicting_unlabelled(self, training: bool = False) -> Iterator[None]:
        """Inside, `predict` gives outputs and labels, whatever the arguments say; the model is not given the labels.

        training: whether the examples are those of the training set, see `filling_prefix`.
        """
        args = copy.copy(self.args)
        args.prediction_loss_only, args.eval_do_concat_batches, args.include_for_metrics = False, True, []
        changes = {"args": args, "compute_metrics": None, "preprocess_logits_for_metrics": None}
        with ExitStack() as stack:
            for name, value in (changes | {"_unlabelled": True}).items():
                stack.enter_context(hooks.replaced(self, name, value))
            if training:
                stack.enter_context(self.filling_prefix())
            try:
                yield
            finally:
                # Trainer would show it among the metrics of every evaluation that follows.
                self.__dict__.pop("model_preparation_time", None)

    @contextmanager
    def filling_prefix(self) -> Iterator[None]:
        """Inside, predictions of training examples fill the cache of the training that follows, if there is one."""
        self.prefix = self.prefix or self._open_prefix()
        with hooks.replaced(self, "_filling_prefix", True):
            yield

    @contextmanager
    def _caching_prefix(self) -> Iterator[None]:
        self.prefix = self.prefix or self._open_prefix()
        try:
            yield
        finally:
            if self.prefix is not None:
                self.prefix.close()
            self.prefix = None

    def _replaying(self, inputs: dict[str, Any], wanted: bool = True) -> AbstractContextManager[None]:
        return self.prefix.replaying(inputs) if wanted and self.prefix is not None else nullcontext()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches: of similar length, or within a budget of tokens, where the arguments say so."""
        plan = batching.training_plan(self)
        if plan is None:
            return hooks.not_empty(super().get_train_dataloader(), self.args)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = batching.EpochBatches(plan, seed, self.args.process_index)
        loader = self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size, SequentialSampler, is_training=True
        )
        return hooks.not_empty(hooks.with_batches(loader, batches), self.args)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader[Any]:
        """Trainer's own; batches are dropped in training alone: evaluations and predictions are of every example."""
        dropping = is_training and self.args.dataloader_drop_last
        with hooks.replaced(self.args, "dataloader_drop_last", dropping):
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """The longest examples first, where batches are by length."""
        if not batching.by_length(self.args) or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        # Neither metrics of single batches nor lists of batches can be put into the data set's order.
        by_batch = self.args.batch_eval_metrics or not self.args.eval_do_concat_batches
        lengths = None if by_batch else batching.token_lengths(eval_dataset)
        return SequentialSampler(eval_dataset) if lengths is None else batching.LongestFirst(lengths)

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """Predictions, labels and metrics in the data set's order, whatever the order of the batches."""
        order = batching.order_of(dataloader)
        if order is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        metrics = batching.metrics_in_order(self.compute_metrics, order)
        with hooks.replaced(self, "compute_metrics", metrics):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        values = {name: getattr(output, name) for name in ("predictions", "label_ids")}
        return output._replace(**batching.restored(values, order))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each (learning rate, weight decay) that LoRA+, head rate and decay give."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and has_own_rates(self.args):
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = self.get_decay_parameter_names(self.model)
            groups = parameter_groups(model or self.model, self.model, self.args, decayed)
            self.optimizer = optimizer_class(groups, **kwargs)
        optimizer = super().create_optimizer(model)
        if not self._is_sharded:
            hooks.check_optimizer(self.model, optimizer)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own or the weighted loss, labels smoothed in training alone, times the batch's share."""
        if self.class_weights is None:
            # Smoothed labels are for learning; evaluation is of the true ones.
            with hooks.replaced(self, "label_smoother", self.label_smoother if model.training else None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            smoothing = self.args.label_smoothing_factor if model.training else 0.0
            loss, outputs = batching.weighted_loss(model, inputs, self.class_weights, smoothing)
        loss = loss if self._share == 1.0 else loss * self._share
        return (loss, outputs) if return_outputs else loss

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's own; a metric that the evaluation has not is one line."""
        check_metric(self.args, (name.removeprefix("eval_") for name in metrics))
        return super()._determine_best_metric(metrics, trial)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _open_prefix(self) -> PrefixCache | None:
        lengths = batching.token_lengths(self.train_dataset)
        return open_prefix_cache(self, None if lengths is None else int(lengths.sum()))
