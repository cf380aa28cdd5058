"""Does a long run grow? Train 2,000 steps and watch the memory of the process.

    python scripts/check_memory.py --json memory.json

Texts of many lengths, dropout, evaluation and checkpoints on the way, as in a real run.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import add_output_arguments, report, resident_mb, write_json
from datasets import Dataset
from tiny_run import write_base, write_texts
from transformers import AutoTokenizer, TrainerCallback

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, load_classifier
from hf_lora.data import DataConfig, prepare_data


class Watch(TrainerCallback):
    """Notes the megabytes of the process every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after each step."""
        if state.global_step % self.every == 0:
            gc.collect()
            self.points.append((state.global_step, resident_mb()))


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Train that many steps; megabytes on the way, and the growth by 1,000 steps in the second half."""
    write_base(folder / "base")
    write_texts(folder / "train.csv", 400)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    data = prepare_data(DataConfig(train_file=str(folder / "train.csv"), max_length=64), tokenizer)
    train: Dataset = data.splits["train"]
    model, _ = load_classifier(str(folder / "base"), data.labels, LoRAConfig(dropout=0.1))
    watch = Watch(max(1, steps // 20))
    arguments = LoRATrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=8,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=steps // 4,
        save_strategy="steps",
        save_steps=steps // 10,
        save_total_limit=2,
        logging_steps=50,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = LoRATrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=data.splits["validation"],
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    late = np.array([point for point in watch.points if point[0] > steps // 2])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    growth = float(late[-1, 1] - late[0, 1])
    return {"points": watch.points, "mb_per_1000_steps": 1000 * slope, "growth_mb": growth}


def main() -> None:
    """Measure, print, write JSON; exit with 1 if it grows by more than a megabyte in 1,000 steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    options = parser.parse_args()
    table = report(options)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.steps)
    table("memory of the process", ("step", "MB"), [(step, f"{mb:.1f}") for step, mb in result["points"]])
    slope = result["mb_per_1000_steps"]
    table("in the second half", ("MB in 1,000 steps",), [(f"{slope:+.2f}",)])
    write_json(options.json, result)
    if slope > 1.0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
