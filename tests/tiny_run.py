"""A training run of a tiny random BERT in processes of its own: what the tests of faults and of clusters start."""

from __future__ import annotations

import csv
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = {
    "weather": ["rain", "sun", "wind", "snow", "cloud", "storm", "frost", "heat", "fog", "hail"],
    "music": ["song", "drum", "choir", "piano", "tune", "chord", "band", "opera", "violin", "rhythm"],
}
FILLERS = ["the", "a", "this", "was", "is", "very", "quite", "and", "but", "it", "we", "they", "had", "more"]
# No threads that would wait for each other, and no network.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# A process that takes longer hangs: even on a busy machine these runs take seconds.
HANGS = 600.0


def write_base(directory: Path) -> None:
    """Write the encoder and its tokenizer, as `save_pretrained` does."""
    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *FILLERS, *WORDS["weather"], *WORDS["music"]]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **tokens).save_pretrained(
        directory
    )


def write_texts(path: Path, count: int, *, seed: int = 0) -> None:
    """Write a CSV of `count` texts of 5 to 40 words, each with words of one topic among fillers."""
    generator = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        for index in range(count):
            label = list(WORDS)[index % 2]
            words = generator.choices(FILLERS, k=generator.randint(4, 36)) + generator.choices(
                WORDS[label], k=2
            )
            generator.shuffle(words)
            rows.writerow([" ".join(words), label])


def train_command(folder: Path, output: Path, *extra: str, steps: int) -> list[str]:
    """`hf-lora train` on the base and the texts of `folder`, with a checkpoint at every second step."""
    settings = {
        "model_name_or_path": folder / "base",
        "train_file": folder / "train.csv",
        "output_dir": output,
        "max_seq_length": 64,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "precision": "fp32",
        "disable_tqdm": "True",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "hf_lora.cli.main", "train", *flags, "--use_cpu", *extra]


def until(met: Callable[[], bool], seconds: float = HANGS, pause: float = 0.005) -> bool:
    """Wait until `met()`, at most `seconds`; whether it was met."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if met():
            return True
        time.sleep(pause)
    return False
