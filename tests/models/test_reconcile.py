"""Tokenizer and model, compared when they are loaded: a table over model types, with the models as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, tiny_tokenizer
from datasets import Dataset
from tiny_models import EOS, TEXT, tiny_model
from transformers import PreTrainedTokenizerBase

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    LoRATrainingArguments,
    TextClassifier,
    load_classifier,
    save_adapter,
)
from hf_lora.models import bundled
from hf_lora.models.loading import load_tokenizer
from hf_lora.models.pooling import choose_pooling
from hf_lora.models.reconcile import check_known, most_tokens, reconcile, vocabulary_rows

TEXTS = [
    "good",
    "the trip was broken and sad but the food we had there was lovely and warm",
    "bad film",
    "the [MASK] was [UNK]",
]
# One of a kind: tables, positions from padding, the last token, encoder-decoders, relative positions, the end of a row.
QUICK = {"bert", "roberta", "gpt2", "llama", "bart", "t5", "modernbert", "xlnet"}
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TEXT]
# What reads padding in any case: by hashes, convolutions, landmarks, or for want of a mask.
READ_PADDING = {"yoso", "canine", "nystromformer", "fnet"}


@pytest.fixture(autouse=True)
def forgotten_warnings() -> None:
    bundled.warn_once.cache_clear()


def other_padding(side: str = "right") -> PreTrainedTokenizerBase:
    """A tokenizer whose padding is not the model's, and whose texts end as an encoder-decoder's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.padding_side = "[SEP]", side
    assert tokenizer.pad_token_id == 0
    return tokenizer


@torch.no_grad()
def alone_and_together(model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]
    return torch.cat(alone), together


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", EACH)
def test_a_text_alone_has_the_logits_that_it_has_in_a_padded_batch(model_type: str, side: str) -> None:
    # [UNK], an ordinary word and, where the last token is found by it, nothing.
    for stated in (1, 7, None) if hasattr(tiny_model(model_type), "score") else (1, 7):
        model, tokenizer = tiny_model(model_type, pad_token_id=stated, eos_token_id=EOS), other_padding(side)
        reconcile(model, tokenizer)
        if model_type not in READ_PADDING:
            torch.testing.assert_close(*alone_and_together(model, tokenizer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", EACH)
def test_the_most_tokens_are_those_that_the_model_runs_on(model_type: str) -> None:
    model = tiny_model(model_type)
    limit = most_tokens(model)

    def run(length: int) -> None:
        ids = torch.full((1, length), 9)
        ids[0, -1] = EOS
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run(limit or 130)
    assert vocabulary_rows(model) == (None if model_type == "canine" else 64)
    if limit is not None and model_type != "tapas":  # which counts anew in each cell
        with pytest.raises((IndexError, RuntimeError)):
            run(limit + 1)


def write_base(folder: Path, model_type: str, tokenizer: Any = None, **settings: Any) -> str:
    """A checkpoint of a model type, with the files of a tokenizer if one is given."""
    tiny_model(model_type, **settings).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_lora")]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("own", [None, "[PAD]"])
def test_one_padding_token_in_training_and_after(
    model_type: str, own: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a padding token of the tokenizer alone, and with none at all."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = own, "[SEP]"
    base = write_base(tmp_path / "base", model_type, tokenizer, pad_token_id=None, eos_token_id=3)
    data = Dataset.from_dict({**tokenizer(TEXTS * 2), "labels": [0, 1] * 4})
    model, tokenizer = load_classifier(base, LABELS, LoRAConfig(rank=2))
    expected = 0 if own else 3
    assert tokenizer.pad_token_id == model.config.pad_token_id == expected
    said = warnings_of(caplog)
    assert len(said) == (0 if own else 1)
    assert own or "the tokenizer's padding token None to '[SEP]'" in said[0]
    args = LoRATrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = LoRATrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    measured = torch.tensor(trainer.predict(data).predictions)[:4]
    torch.testing.assert_close(*alone_and_together(model.eval(), tokenizer), rtol=0, atol=1e-5)
    directory = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    loaded = TextClassifier.from_pretrained(directory, precision="fp32")
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == expected
    one_by_one = torch.cat([loaded.logits([text]) for text in TEXTS])
    torch.testing.assert_close(loaded.logits(TEXTS), measured, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one, measured, rtol=0, atol=1e-5)


def test_positions_that_follow_from_the_padding_token_are_kept() -> None:
    """RoBERTa's tables begin after the row of its padding token, with which it was built."""
    model, tokenizer = tiny_model("roberta", pad_token_id=1), other_padding()
    reconcile(model, tokenizer)
    assert (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.pad_token) == (1, 1, "[UNK]")


FILES = [
    ("bert", None, "vocab.txt"),
    ("roberta", None, "tokenizer.json"),
    ("roberta", "vocab.json", "merges"),
    ("gpt2", None, ""),
    ("deberta-v2", None, "tokenizer.json"),
    ("xlnet", None, "tokenizer.json"),
    ("albert", None, "tokenizer.json"),
    ("llama", None, "tokenizer"),
    ("modernbert", None, "tokenizer"),
    ("esm", None, "tokenizer"),
    ("bert", "tokenizer_config.json", "vocab.txt"),
]


@pytest.mark.parametrize(("model_type", "left", "words"), FILES)
def test_a_base_without_all_files_of_its_tokenizer_is_refused(
    model_type: str, left: str | None, words: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", model_type, vocab_size=128)
    if left:
        content: dict[str, Any] = {"tokenizer_class": "BertTokenizer"}
        if left == "vocab.json":
            content = {
                word: row for row, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcd"])
            }
        (tmp_path / "base" / left).write_text(json.dumps(content))
    for load in (load_tokenizer, lambda base: load_classifier(base, LABELS)):
        with pytest.raises((ValueError, OSError)) as error:
            load(base)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert type(error.value) in (ValueError, OSError)


def write_snapshot(cache: Path, model_type: str) -> None:
    """A Hub cache with configuration and weights only, as an interrupted download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--org--name"
    write_base(folder / "snapshots" / commit, model_type, vocab_size=128)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def test_an_incomplete_snapshot_of_the_hub_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_snapshot(tmp_path, "bert")
    with pytest.raises(
        ValueError, match="the tokenizer is not that of the model; got 5 tokens for 128 embeddings"
    ):
        load_tokenizer("org/name", cache_dir=str(tmp_path))
    assert choose_pooling("auto", "org/name", cache_dir=str(tmp_path)).pooling == "native"
    [said] = warnings_of(caplog)
    assert "whether 'org/name' is a sentence encoder is not known" in said


def test_texts_of_unknown_words_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_known(tokenizer, tokenizer(["good film nobody", "", "xyz the"])["input_ids"])
    with pytest.raises(
        ValueError, match=r"does not know most of the texts; got 67% of their tokens as '\[UNK\]'"
    ):
        check_known(tokenizer, tokenizer(["kein Wort davon", "", "gar good the"])["input_ids"])
