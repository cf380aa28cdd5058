"""Fine-tuning from data to a measured, saved classifier: what `hf-lora train` does, as Python."""

from __future__ import annotations

import copy
import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from hf_lora._files import reserved
from hf_lora.adapters.card import RunSummary
from hf_lora.adapters.loading import load_classifier
from hf_lora.data import ClassificationData, DataConfig, prepare_data
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import trainable_parameter_count
from hf_lora.models.cpu import set_threads
from hf_lora.models.loading import choose_precision, load_tokenizer
from hf_lora.models.pooling import AUTO, choose_pooling
from hf_lora.models.reconcile import check_known
from hf_lora.models.verify import probe_batch, verify_injection
from hf_lora.recipe.compare import Snapshot, baseline_logits, keep_the_better, refit, refit_probe, watched
from hf_lora.recipe.head_start import start_head
from hf_lora.recipe.options import FROM_DATA, FinetuneOptions
from hf_lora.recipe.progress import Progress, attach, data_facts, progress_of, stage
from hf_lora.recipe.results import FinetuneResult, measure_test, measure_validation, write_results
from hf_lora.recipe.settings import (
    Recipe,
    check_resumed,
    choose_epochs,
    choose_rate,
    choose_refit,
    choose_smoothing,
    is_sharded,
    last_layer_only,
    prepare_output,
    with_data,
)
from hf_lora.tasks.metrics import compute_metrics
from hf_lora.training.arguments import LoRATrainingArguments, check_metric, result_names
from hf_lora.training.checkpoints import ending_on_sigterm
from hf_lora.training.distributed import on_first, whole_weights
from hf_lora.training.gradient_init import choose_start
from hf_lora.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)


def finetune(
    model: str,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    *,
    output_dir: str | Path | None = None,
    lora: LoRAConfig | None = None,
    args: LoRATrainingArguments | None = None,
    options: FinetuneOptions | None = None,
    data: DataConfig | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune a pretrained encoder with LoRA into a text classifier: all that `hf-lora train` does.

    model: a Hub id or a directory.
    train, validation, test: each a path, a `Dataset`, a DataFrame or a list of dicts; `train` may be a `DatasetDict`
        with all of them. Without `validation` a part of `train` is held out.
    output_dir: where the adapter, `metrics.json` and checkpoints go.
    settings: any option of `hf-lora train` by its name, such as `learning_rate=1e-3`, `lora_rank=4` or
        `max_seq_length=64`; `hf-lora train --help_all` lists them, and so does the reference.
    lora, data, options, args: the same as objects, in the place of single options. `args` is used as it is, with the
        Trainer's own defaults.
    progress: what is told meanwhile; True: lines that are printed; None: nothing.

    The same call gives the same adapter, bit for bit, and so does the command line with the same options.
    Raises ValueError or OSError, in one line, for anything the user can mend; nothing is lost then.
    """
    objects: dict[str, Any] = {"lora": lora, "args": args, "options": options, "data": data}
    output = args.output_dir if output_dir is None and args is not None else output_dir
    values, tables = with_data(settings, model, output, train=train, validation=validation, test=test)
    objects = {name: value for name, value in objects.items() if value is not None}
    recipe = Recipe.from_settings(values, tables=tables, objects=objects)
    return Finetuning(recipe, progress=progress_of(progress)).run()


class Finetuning:
    """One run. The methods stand in the order in which `run` calls them; each leaves what the next ones need.

    data: what `prepare_data` gives for this recipe, where several runs share it.
    """

    def __init__(
        self, recipe: Recipe, *, data: ClassificationData | None = None, progress: Progress | None = None
    ) -> None:
        self.recipe, self.options = recipe, recipe.options
        self.args = copy.copy(recipe.args)
        if data is not None:
            self.data = data
        first = self.args.process_index == 0
        self.progress = progress if first and progress is not None else Progress()
        self.is_probe = recipe.lora is None
        self.spent: dict[str, float] = {}

    def run(self) -> FinetuneResult:
        """The whole run."""
        if self.is_probe and self.options.head_init == "random":
            raise ValueError(
                "nothing would be trained; got lora_rank=0 with head_init=random; expected head_init=probe with it"
            )
        output = Path(self.args.output_dir)
        alone = reserved(output) if self.args.process_index == 0 else nullcontext()
        with ending_on_sigterm(gives_way=True), alone:
            overwrite = self.options.overwrite_output_dir
            self.resume = on_first(lambda: prepare_output(self.args, overwrite=overwrite))
            self.prepare_data()
            self.choose_settings()
            self.load_model()
            self.verify()
            self.make_trainer()
            self.start()
            self.train()
            self.measure()
            self.retrain()
            return self.save()

    def prepare_data(self) -> None:
        """Read, check, split and tokenize the data."""
        set_seed(self.args.seed)
        if not torch.cuda.is_available():
            # It has no effect without a GPU but a warning at every epoch.
            self.args.dataloader_pin_memory = False
        if self.args.device.type == "cpu":
            set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        model = self.recipe.model
        self.tokenizer = load_tokenizer(model.model_name_or_path, **model.place)
        if not hasattr(self, "data"):
            with self.args.main_process_first(desc="preparing the data"):
                self.data = prepare_data(self.recipe.data, self.tokenizer, tables=self.recipe.tables)
        check_known(self.tokenizer, self.data.splits["train"]["input_ids"][:1000])
        for topic, text in data_facts(self.data):
            self.progress.fact(topic, text)

    def choose_settings(self) -> None:
        """What is left open and depends on the data: rate, epochs, label smoothing, whether to retrain in the end."""
        check_metric(self.args, result_names(self.data.task, self.data.labels if self.args.report_to else ()))
        examples = len(self.data.splits["train"])
        self.refits = choose_refit(self.options, self.args, self.data)
        words = [word for name, word in FROM_DATA.items() if getattr(self.args, name) == 0]
        chosen = f"{choose_rate(self.args, examples)}, {choose_epochs(self.args, examples)}"
        choose_smoothing(self.args, self.data.task)
        on_first(lambda: check_resumed(self.resume, self.recipe, self.args, self.data))
        chosen += f" ({' and '.join(words)} by the number of examples)" if words else ""
        if not self.is_probe:
            self.progress.fact("training", chosen)

    def load_model(self) -> None:
        """The pretrained encoder with head and LoRA."""
        args, model = self.args, self.recipe.model
        precision = choose_precision(
            self.options.precision, args.device, autocast=args.bf16 or args.fp16, sharded=is_sharded(args)
        )
        pooling = choose_pooling(
            self.options.pooling,
            model.model_name_or_path,
            labels=len(self.data.labels),
            last_only=last_layer_only(args, self.is_probe),
            **model.place,
        )
        # Once more, so that the head and A do not depend on what the data preparation drew.
        set_seed(args.seed)
        with whole_weights():
            self.model, self.tokenizer = load_classifier(
                model.model_name_or_path,
                self.data.labels,
                self.recipe.lora_config,
                problem_type=self.data.problem_type,
                pooling=pooling.pooling,
                max_length=self.data.max_length,
                text_columns=self.data.text_columns,
                label_columns=self.data.label_columns,
                label_layout=self.data.label_layout,
                dtype=precision.dtype,
                **model.place,
            )
        reason = pooling.reason.partition(";")[0]
        self.progress.fact("encoder", f"{precision.name}, {pooling.pooling} pooling ({reason})")

    def verify(self) -> None:
        """Check that every adapted layer acts on the output."""
        args, name = self.args, self.recipe.model.model_name_or_path
        report = verify_injection(self.model, probe_batch(self.model, self.tokenizer), allow_unused=True)
        if args.ddp_find_unused_parameters is None:
            # Looking for them costs a walk through the graph at every step; the probe has just looked.
            args.ddp_find_unused_parameters = bool(report.unused)
        self.progress.fact("model", f"{name}, {trainable_parameter_count(self.model)}")
        if args.world_size > 1:
            self.progress.fact("processes", f"{args.world_size} ({args.parallel_mode.value})")

    def make_trainer(self) -> None:
        """LoRATrainer with the metrics of the task; early stopping where it is asked for."""
        args, patience = self.args, self.options.early_stopping_patience
        self.trainer = LoRATrainer(
            model=self.model,
            args=args,
            train_dataset=self.data.splits["train"],
            eval_dataset=self.data.splits["validation"],
            processing_class=self.tokenizer,
            compute_metrics=compute_metrics(
                self.data.problem_type, self.data.labels, by_class=bool(args.report_to)
            ),
            callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
        )
        attach(self.trainer, self.progress)
        self.trainer.start_options = self.recipe.start_options
        self.fresh = Snapshot.of(self.model)
        output = Path(args.output_dir)
        self.trainer.facts = RunSummary(
            model_name=output.name,
            dataset_name=self.recipe.data.dataset_name,
            license=self.options.model_card_license,
            language=self.options.language,
            label_counts=self.data.report.label_counts,
            place=args.hub_model_id or (None if output.is_absolute() else args.output_dir),
        )

    def start(self) -> None:
        """The linear probe, the head that begins there, and A along the gradient of the training loss."""
        options = self.options
        with stage(self.progress, "features", self.trainer):
            self.head = start_head(
                self.trainer,
                "probe" if self.is_probe else options.head_init,
                penalty=1.0 if self.is_probe else options.head_penalty,
                choose_layers=options.pooling == AUTO,
                on_all=self.refits,
            )
            self.baselines = baseline_logits(self.trainer, self.data, self.head.warm)
        self.progress.fact("head", str(self.head))
        seconds = self.head.seconds
        if not self.is_probe:
            lora_start = choose_start(self.trainer, self.recipe.lora_init, self.head.kind)
            seconds += lora_start.seconds
            self.progress.fact("LoRA", str(lora_start))
        self.spent = {"warm_start_runtime": seconds, "train_runtime": 0.0}

    def train(self) -> None:
        """Train, and keep the probe where LoRA did clearly worse. Evaluations do not count as seconds of training."""
        # And once more: training draws the same with any start.
        set_seed(self.args.seed)
        if self.is_probe:
            return
        warm = self.head.fallback(self.recipe.lora_config.train_head)
        before = Snapshot.of(self.model) if warm is not None else None
        with watched(self.trainer) as evaluations:
            self.spent |= self.trainer.train(resume_from_checkpoint=self.resume).metrics
        self.spent["evaluation_runtime"] = evaluations.seconds
        self.spent["train_runtime"] = max(0.0, self.spent["train_runtime"] - evaluations.seconds)
        if before is None or warm is None:
            return
        began = time.perf_counter()
        with stage(self.progress, "comparing with the linear probe", self.trainer):
            kept = keep_the_better(self.trainer, self.data, before, warm, evaluations.outputs())
        self.spent["evaluation_runtime"] += time.perf_counter() - began
        self.is_probe = kept is not None
        if kept is not None and self.trainer.is_world_process_zero():
            logger.warning(kept)

    def measure(self) -> None:
        """Results on the validation split, on which temperature and thresholds are fitted."""
        with stage(self.progress, "validation", self.trainer):
            self.validation, self.info, self.outputs = measure_validation(
                self.trainer, self.data, self.baselines
            )

    def retrain(self) -> None:
        """Train once more on all examples, the held-out ones too, where the examples are few."""
        if not self.refits:
            return
        run = self.trainer, self.data, self.head
        if self.is_probe:
            again = refit_probe(*run)
        else:
            again = refit(*run, self.fresh, self.recipe.lora_init, self.outputs, self.progress)
        self.spent |= again.metrics()
        self.progress.fact("retraining", str(again))

    def save(self) -> FinetuneResult:
        """Measure the test split, write the adapter and `metrics.json`, and push them where that is asked for."""
        test = None
        if "test" in self.data.splits:
            with stage(self.progress, "test", self.trainer):
                test = measure_test(self.trainer, self.data, self.baselines, self.info)
        return write_results(self.trainer, self.info, self.validation, test, self.spent)
