"""One training run from the command line's arguments: data, model, LoRATrainer, adapter, metrics.json.

The same for `hf-lora train` and for `accelerate launch scripts/train.py`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed

from hf_lora.adapters.card import RunSummary
from hf_lora.adapters.loading import load_classifier
from hf_lora.cli.parsing import parse_training
from hf_lora.data import ClassificationData, prepare_data
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import inject_lora, trainable_parameter_count
from hf_lora.models.cpu import set_threads
from hf_lora.models.loading import choose_precision, load_tokenizer, meta_classifier
from hf_lora.models.pooling import AUTO, choose_pooling
from hf_lora.models.verify import probe_batch, verify_injection
from hf_lora.recipe.arguments import FROM_DATA, DataArguments, LoRAArguments, ModelArguments, RunArguments
from hf_lora.recipe.compare import Snapshot, baseline_logits, keep_the_better, watched
from hf_lora.recipe.head_start import HeadStart, start_head
from hf_lora.recipe.output import prepare_output, reserved
from hf_lora.recipe.refit import refit, refit_probe
from hf_lora.recipe.results import finish, validated
from hf_lora.recipe.run_settings import (
    choose_epochs,
    choose_rate,
    choose_refit,
    choose_smoothing,
    data_config,
    hub_options,
    is_sharded,
    last_layer_only,
    lora_config,
)
from hf_lora.tasks.metrics import compute_metrics
from hf_lora.training.arguments import LoRATrainingArguments
from hf_lora.training.distributed import on_first, whole_weights
from hf_lora.training.gradient_init import choose_start
from hf_lora.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)


def run_training(argv: list[str], *, data: ClassificationData | None = None) -> dict[str, Any]:
    """Parse `argv`, train, evaluate and export; returns what it wrote to `metrics.json`.

    data: what `prepare_data` gives for these arguments, where several runs share it; None: it is prepared here.
    Raises ValueError, in one line, for anything the user can mend.
    """
    model_args, data_args, lora_args, run_args, args = parse_training(argv)
    if run_args.dry_run:
        return dry_run(model_args, lora_config(lora_args), args)
    with reserved(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        return _run(model_args, data_args, lora_args, run_args, args, data)


def _run(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoRAArguments,
    run_args: RunArguments,
    args: LoRATrainingArguments,
    data: ClassificationData | None,
) -> dict[str, Any]:
    if lora_args.lora_rank == 0 and lora_args.head_init == "random":
        raise ValueError(
            "nothing would be trained; got lora_rank=0 with head_init=random; expected head_init=probe with it"
        )
    resume = on_first(lambda: prepare_output(args, run_args))
    set_seed(args.seed)
    if not torch.cuda.is_available():
        args.dataloader_pin_memory = False  # has no effect without a GPU but a warning at every epoch
    if args.device.type == "cpu":
        set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    hub = hub_options(model_args)
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision, **hub)
    if data is None:
        with args.main_process_first(desc="preparing the data"):
            data = prepare_data(data_config(data_args, model_args, args), tokenizer)
    if args.process_index == 0:
        print(data.report, flush=True)
    examples = len(data.splits["train"])
    refits = choose_refit(
        run_args.refit,
        args,
        held_out=data.held_out,
        examples=examples + len(data.splits["validation"]),
        stopping=run_args.early_stopping_patience is not None,
    )
    chosen = (
        choose_rate(args, examples),
        choose_epochs(args, examples),
        choose_smoothing(args, data.problem_type),
    )
    if args.process_index == 0:
        print(*filter(None, chosen), sep="\n", flush=True)
    precision = choose_precision(
        run_args.precision, args.device, autocast=args.bf16 or args.fp16, sharded=is_sharded(args)
    )
    pooling = choose_pooling(
        lora_args.pooling,
        model_args.model_name_or_path,
        labels=len(data.labels),
        last_only=last_layer_only(args, lora_args.lora_rank),
        revision=model_args.model_revision,
        **hub,
    )
    # Once more, so that the head and A do not depend on what the data preparation drew.
    set_seed(args.seed)
    with whole_weights():
        model, tokenizer = load_classifier(
            model_args.model_name_or_path,
            data.labels,
            lora_config(lora_args),
            problem_type=data.problem_type,
            pooling=pooling.pooling,
            max_length=data.max_length,
            text_columns=data.text_columns,
            revision=model_args.model_revision,
            dtype=precision.dtype,
            **hub,
        )
    report = verify_injection(model, probe_batch(model, tokenizer), allow_unused=True)
    if args.ddp_find_unused_parameters is None:
        # Looking for them costs a walk through the graph at every step; the probe has just looked.
        args.ddp_find_unused_parameters = bool(report.unused)
    if args.process_index == 0:
        print(trainable_parameter_count(model), precision, report, pooling, sep="\n", flush=True)
        if args.world_size > 1:
            print(f"processes: {args.world_size} ({args.parallel_mode.value})", flush=True)
    trainer = make_trainer(model, tokenizer, data, args, run_args)
    fresh = Snapshot.of(model)
    trainer.facts = RunSummary(
        model_name=Path(args.output_dir).name,
        dataset_name=data_args.dataset_name,
        license=run_args.model_card_license,
        language=run_args.language,
        label_counts=data.report.label_counts,
        place=args.hub_model_id or (None if Path(args.output_dir).is_absolute() else args.output_dir),
    )
    stops = lora_args.lora_rank == 0
    start = start_head(
        trainer,
        "probe" if stops else lora_args.head_init,
        penalty=1.0 if stops else lora_args.head_penalty,
        choose_layers=lora_args.pooling == AUTO,
        on_all=refits,
    )
    if args.process_index == 0:
        print(start, flush=True)
    seconds = start.seconds
    if lora_args.lora_rank > 0:
        lora_start = choose_start(trainer, lora_args.lora_init, start.kind)
        seconds += lora_start.seconds
        if args.process_index == 0:
            print(lora_start, flush=True)
    baselines = baseline_logits(trainer, data, start.warm)
    # And once more: training draws the same with any start.
    set_seed(args.seed)
    train_metrics = {"warm_start_runtime": seconds, "train_runtime": 0.0}
    is_probe = lora_args.lora_rank == 0
    if not is_probe:
        metrics, is_probe = train_timed(trainer, data, start, resume)
        train_metrics |= metrics
    validation = validated(trainer, data, baselines)
    if refits:
        again = (
            refit_probe(trainer, data, start)
            if is_probe
            else refit(trainer, data, start, fresh, lora_args.lora_init, validation.outputs)
        )
        train_metrics |= again.metrics()
        if args.process_index == 0:
            print(again, flush=True)
    return finish(trainer, data, train_metrics, baselines, validation)


def train_timed(
    trainer: LoRATrainer, data: ClassificationData, start: HeadStart, resume: str | None
) -> tuple[dict[str, float], bool]:
    """Train, and keep the probe that it started from if that is better.

    Returns the metrics of training and whether the probe was kept. The seconds of evaluations are taken from those
    of training.
    """
    before = Snapshot.of(trainer.model) if start.kind == "probe" and start.warm else None
    with watched(trainer) as evaluations:
        metrics = trainer.train(resume_from_checkpoint=resume).metrics
    metrics["evaluation_runtime"] = evaluations.seconds
    metrics["train_runtime"] = max(0.0, metrics["train_runtime"] - evaluations.seconds)
    kept = None
    if before is not None and start.warm is not None:
        began = time.perf_counter()
        kept = keep_the_better(trainer, data, before, start.warm, evaluations.outputs())
        metrics["evaluation_runtime"] += time.perf_counter() - began
        if kept is not None and trainer.is_world_process_zero():
            logger.warning(kept)
    return metrics, kept is not None


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: ClassificationData,
    args: LoRATrainingArguments,
    run_args: RunArguments,
) -> LoRATrainer:
    """The LoRATrainer of a run, with the metrics of its problem type and early stopping if asked for."""
    callbacks: list[TrainerCallback] = []
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run_args.early_stopping_patience))
        args.load_best_model_at_end = True
        args.metric_for_best_model = args.metric_for_best_model or "loss"
        if args.greater_is_better is None:
            args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    return LoRATrainer(
        model=model,
        args=args,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics(data.problem_type, data.labels, by_class=bool(args.report_to)),
        callbacks=callbacks,
    )


def dry_run(model_args: ModelArguments, config: LoRAConfig, args: LoRATrainingArguments) -> dict[str, Any]:
    """Print the resolved configuration and the modules that would be adapted, without loading weights."""
    model = meta_classifier(
        model_args.model_name_or_path, revision=model_args.model_revision, **hub_options(model_args)
    )
    names = inject_lora(model, config)
    left_open = {name: "from the data" for name in FROM_DATA if getattr(args, name) == 0}
    training = args.to_dict() | left_open
    print(json.dumps({"lora": config.to_dict(), "training": training}, indent=2, sort_keys=True))
    print("\n".join(names))
    print(f"{len(names)} modules; {trainable_parameter_count(model)} with a head of 2 labels")
    return {"modules": names}
