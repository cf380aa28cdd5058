"""A random BERT of two small blocks with its tokenizer, and texts it can learn: what the checks of faults train."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = {
    "weather": ["rain", "sun", "wind", "snow", "cloud", "storm", "frost", "heat", "fog", "hail"],
    "music": ["song", "drum", "choir", "piano", "tune", "chord", "band", "opera", "violin", "rhythm"],
}
FILLERS = ["the", "a", "this", "was", "is", "very", "quite", "and", "but", "it", "we", "they", "had", "more"]


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
