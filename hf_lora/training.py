"""One training run from the command line's arguments: data, model, LoRATrainer, adapter, metrics.json.

The same for `hf-lora train` and for `accelerate launch scripts/train.py`.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed

from hf_lora.acceleration import set_threads
from hf_lora.arguments import DataArguments, LoRAArguments, ModelArguments, RunArguments
from hf_lora.config import LoRAConfig
from hf_lora.data import ClassificationData, DataConfig, prepare_data
from hf_lora.inject import inject_lora, trainable_parameter_count
from hf_lora.metrics import compute_metrics
from hf_lora.model_card import CardFacts
from hf_lora.modeling import load_classifier, load_tokenizer, meta_classifier
from hf_lora.parsing import parse_training
from hf_lora.precision import choose_precision
from hf_lora.processes import on_first
from hf_lora.results import finish
from hf_lora.run_directory import prepare_output, reserved
from hf_lora.sharding import whole_weights
from hf_lora.trainer import LoRATrainer
from hf_lora.training_arguments import LoRATrainingArguments
from hf_lora.verify import probe_batch, verify_injection


def run_training(argv: list[str], *, data: ClassificationData | None = None) -> dict[str, Any]:
    """Parse `argv`, train, evaluate and export; returns what it wrote to `metrics.json`.

    data: what `prepare_data` gives for these arguments, where several runs share it; None: it is prepared here.
    Raises ValueError, in one line, for anything the user can mend.
    """
    model_args, data_args, lora_args, run_args, args = parse_training(argv)
    config = lora_config(lora_args)
    if run_args.dry_run:
        return dry_run(model_args, config, args)
    with reserved(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        return _run(model_args, data_args, config, run_args, args, data)


def _run(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: LoRAConfig,
    run_args: RunArguments,
    args: LoRATrainingArguments,
    data: ClassificationData | None,
) -> dict[str, Any]:
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
    precision = choose_precision(
        run_args.precision, args.device, autocast=args.bf16 or args.fp16, sharded=is_sharded(args)
    )
    # Once more, so that the head and A do not depend on what the data preparation drew.
    set_seed(args.seed)
    with whole_weights():
        model, tokenizer = load_classifier(
            model_args.model_name_or_path,
            data.labels,
            config,
            problem_type=data.problem_type,
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
        print(trainable_parameter_count(model), precision, report, sep="\n", flush=True)
        if args.world_size > 1:
            print(f"processes: {args.world_size} ({args.parallel_mode.value})", flush=True)
    trainer = make_trainer(model, tokenizer, data, args, run_args)
    trainer.facts = CardFacts(
        model_name=Path(args.output_dir).name,
        dataset_name=data_args.dataset_name,
        license=run_args.model_card_license,
        language=run_args.language,
        label_counts=data.report.label_counts,
        place=args.hub_model_id or (None if Path(args.output_dir).is_absolute() else args.output_dir),
    )
    clock = EvaluationClock()
    trainer.add_callback(clock)
    train_metrics = trainer.train(resume_from_checkpoint=resume).metrics
    trainer.remove_callback(clock)
    train_metrics["train_runtime"] = max(0.0, train_metrics["train_runtime"] - clock.seconds)
    return finish(trainer, data, train_metrics)


def lora_config(arguments: LoRAArguments) -> LoRAConfig:
    """The LoRAConfig that the command line's arguments ask for."""
    targets = arguments.lora_target_modules
    single = (
        targets is not None
        and len(targets) == 1
        and not targets[0].replace(".", "").replace("_", "").isalnum()
    )
    expression = targets is not None and (single or targets == ["all-linear"])
    return LoRAConfig(
        rank=arguments.lora_rank,
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        projections=arguments.lora_projections,
        target_modules=None if targets is None else targets[0] if expression else tuple(targets),
        layers=None if arguments.lora_layers is None else tuple(arguments.lora_layers),
        rank_pattern=_json_object("lora_rank_pattern", arguments.lora_rank_pattern),
        alpha_pattern=_json_object("lora_alpha_pattern", arguments.lora_alpha_pattern),
        bias=arguments.lora_bias,
        train_head=arguments.train_head,
        init=arguments.lora_init,
        variant=arguments.lora_variant,
        scaling=arguments.lora_scaling,
        form=arguments.lora_form,
    )


def data_config(arguments: DataArguments, model: ModelArguments, args: LoRATrainingArguments) -> DataConfig:
    """The DataConfig that the command line's arguments ask for."""
    values = asdict(arguments)
    values["max_length"] = values.pop("max_seq_length")
    split_seed = values.pop("split_seed")
    seed = args.seed if split_seed is None else split_seed
    return DataConfig(**values, seed=seed, cache_dir=model.cache_dir, token=model.token)


def hub_options(arguments: ModelArguments) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes of the model arguments."""
    return {
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def is_sharded(args: LoRATrainingArguments) -> bool:
    """Whether parameters are to be sharded over the processes, by the flags or by `accelerate launch`."""
    by_launcher = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(os.environ.get(name) == "true" for name in by_launcher)


class EvaluationClock(TrainerCallback):
    """Adds up the seconds that evaluations take during training."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        """Called by the Trainer after each evaluation."""
        self.seconds += metrics.get("eval_runtime", 0.0)


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
    print(json.dumps({"lora": config.to_dict(), "training": args.to_dict()}, indent=2, sort_keys=True))
    print("\n".join(names))
    print(f"{len(names)} modules; {trainable_parameter_count(model)} with a head of 2 labels")
    return {"modules": names}


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON; got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f'{name} is not a JSON object; got {text!r}; expected such as {{"query": 16}}')
    return value
