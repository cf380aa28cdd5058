"""Tokenizer and model, compared when they are loaded: a table over model types, with the models as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, tiny_tokenizer
from datasets import Dataset
from helpers_commands import call
from tiny_models import EOS, TEXT, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    CanineTokenizer,
    PreTrainedTokenizerBase,
)

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    LoRATrainingArguments,
    TextClassifier,
    inject_lora,
    load_classifier,
    save_adapter,
)
from hf_lora.data import DataConfig, prepare_data
from hf_lora.data.collation import fill_empty
from hf_lora.models import bundled
from hf_lora.models.loading import load_base, load_tokenizer
from hf_lora.models.pooling import choose_pooling
from hf_lora.models.reconcile import check_finite, check_known, most_tokens, reconcile, vocabulary_rows
from hf_lora.models.verify import probe_batch, verify_injection
from hf_lora.serving.export import export_onnx
from hf_lora.serving.onnx import load_onnx

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
    assert call("merge", "--adapter", directory, "--output_dir", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    together = alone_and_together(merged, AutoTokenizer.from_pretrained(tmp_path / "merged"))[1]
    torch.testing.assert_close(together, measured, rtol=0, atol=1e-5)


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


def beyond(*tokens: str, pad: str | None = None, rows: int = 44) -> Any:
    """A tokenizer that was given tokens after the model's embeddings were made."""
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == rows
    tokenizer.add_tokens(list(tokens))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def test_tokens_without_an_embedding_are_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", "bert", beyond("<new>", "<newer>"), vocab_size=45)
    message = "no embedding for; got 1, first '<newer>' with id 45; expected ids below 45"
    with pytest.raises(ValueError, match=message):
        load_classifier(base, LABELS)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(base)


def test_a_padding_token_without_an_embedding_has_another_in_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_base(tmp_path / "base", "gpt2", beyond(pad="<p>"), vocab_size=44, pad_token_id=None)
    model, tokenizer = load_classifier(base, LABELS)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 3
    [said] = warnings_of(caplog)
    assert "the tokenizer's padding token '<p>' to '[SEP]'" in said
    # The token is forgotten, so that a text that has it is read as any other.
    assert max(tokenizer(["good <p>"])["input_ids"][0]) < 44
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(base, kept=AutoTokenizer.from_pretrained(tmp_path / "again")).pad_token == "[SEP]"


def test_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name in ("pad", "eos", "sep", "unk"):
        setattr(tokenizer, f"{name}_token", None)
    with pytest.raises(ValueError, match="there is no token to pad with; got pad_token None"):
        reconcile(tiny_model("llama", pad_token_id=None), tokenizer)


def test_token_types_without_a_row_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = BertTokenizer(vocab=tiny_tokenizer().get_vocab())
    pairs = [("the film", "good"), ("a", "bad day")]
    assert 1 in tokenizer(*pairs[0])["token_type_ids"]
    base = write_base(tmp_path / "base", "roberta", tokenizer, type_vocab_size=1)
    model, tokenizer = load_classifier(base, LABELS)
    assert "without token_type_ids, since the model has one type" in " ".join(warnings_of(caplog))
    assert set(tokenizer(*pairs[0])) == {"input_ids", "attention_mask"}
    directory = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    # RoBERTa takes the first row where it is given no types.
    expected = [model.eval()(**tokenizer(*pair, return_tensors="pt")).logits for pair in pairs]
    loaded = TextClassifier.from_pretrained(directory, precision="fp32")
    torch.testing.assert_close(loaded.logits(pairs), torch.cat(expected).detach(), rtol=0, atol=1e-5)


def test_a_text_is_never_longer_than_the_models_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    base = write_base(tmp_path / "base", "roberta", tokenizer, pad_token_id=1)
    with pytest.raises(ValueError, match="max_length is 64; the model has positions for 62 tokens"):
        load_classifier(base, LABELS, max_length=64)
    model, tokenizer = load_classifier(base, LABELS, max_length=62)
    assert tokenizer.model_max_length == 62
    assert any("longest text 512 to 62" in said for said in warnings_of(caplog))
    long = "good film " * 100
    directory = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    # As written by a version that did not compare them.
    sidecar = directory / "hf_lora.json"
    content = json.loads(sidecar.read_text())
    for written in (None, 512):
        sidecar.write_text(json.dumps({**content, "max_length": written}))
        loaded = TextClassifier.from_pretrained(directory, precision="fp32")
        assert loaded.logits([long, "good"]).isfinite().all()
        assert loaded.info.max_length == (62 if written else None)
    assert "max_length is 512; texts are cut to 62 tokens" in warnings_of(caplog)[-1]


@pytest.mark.slow  # reading its tokenizer alone takes seconds
def test_canine_reads_any_character(tmp_path: Path) -> None:
    """It has no table of tokens; its tokenizer has more than a million."""
    base = write_base(tmp_path / "base", "canine", CanineTokenizer())
    model, tokenizer = load_classifier(base, LABELS, LoRAConfig(rank=2))
    verify_injection(model, probe_batch(model, tokenizer), allow_unused=True)
    directory = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    loaded = TextClassifier.from_pretrained(directory)
    assert loaded.tokenizer.model_max_length == 64
    assert loaded.logits(["", "a", "Ω" * 500]).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("bert").to(dtype)
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] = value
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    name = "bert.encoder.layer.1.output.dense.weight"
    with pytest.raises(ValueError, match=f"got NaN or infinity in 1 of 4,096 numbers of '{name}'"):
        load_classifier(str(tmp_path), LABELS)


def test_large_weights_whose_sum_overflows_are_finite() -> None:
    model = tiny_model("bert")
    model.classifier.weight.data.fill_(3e38)
    check_finite(model, "base")


def broken(base: Path, name: str, content: bytes) -> None:
    if name == "pytorch_model.bin":
        (base / "model.safetensors").unlink()
    (base / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"not tensors at all"),
        ("model.safetensors", b""),
        ("pytorch_model.bin", b"neither a pickle"),
        ("pytorch_model.bin", b"\x80\x02cos\nsystem\n."),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "nothing-known"}'),
        ("config.json", b'{"model_type": "vit"}'),
        ("config.json", b'{"model_type": "bert", "hidden_size": "wide"}'),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"["),
    ],
)
def test_broken_files_of_a_base_are_told_in_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base, "bert", tiny_tokenizer())
    broken(base, name, content)
    with pytest.raises((ValueError, OSError)) as error:
        load_classifier(str(base), LABELS)
    assert type(error.value) in (ValueError, OSError)
    assert "\n" not in str(error.value) and str(base) in str(error.value) and len(str(error.value)) < 700
    assert "weights_only" not in str(error.value)


def test_a_base_of_no_such_name_is_told_in_one_line() -> None:
    with pytest.raises(OSError, match="the base model 'org/nowhere' cannot be loaded; got") as error:
        load_base("org/nowhere", LABELS)
    assert "\n" not in str(error.value)


def adds_nothing() -> PreTrainedTokenizerBase:
    """A tokenizer that gives an empty text no token, and has none to pad with."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    assert tokenizer("")["input_ids"] == []
    return tokenizer


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_an_empty_text_is_one_token_in_training_and_prediction(model_type: str, tmp_path: Path) -> None:
    """[UNK]: a blank gives no token either, and [SEP] is the padding."""
    base = write_base(tmp_path / "base", model_type, adds_nothing(), pad_token_id=None, eos_token_id=3)
    model, tokenizer = load_classifier(base, LABELS, LoRAConfig(rank=2))
    rows = [
        {"text": text, "label": label} for text, label in [("", "a"), ("good", "b"), ("a bad day", "a")] * 4
    ]
    data = prepare_data(DataConfig(max_length=16), tokenizer, tables={"train": rows})
    texts = data.texts["train"]["text"][:]
    assert data.splits["train"]["input_ids"][texts.index("")] == [1]
    assert data.splits["train"]["attention_mask"][texts.index("")] == [1]
    directory = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    loaded = TextClassifier.from_pretrained(directory, precision="fp32")
    given = ["", "good", "   ", *TEXTS]
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[1]])).logits[0]
    together = loaded.logits(given)
    torch.testing.assert_close(
        together, torch.cat([loaded.logits([text]) for text in given]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(together[[0, 2]], expected.expand(2, -1), rtol=0, atol=1e-5)


def test_an_empty_text_without_any_token_is_refused() -> None:
    tokenizer = adds_nothing()
    for name in ("unk", "cls"):
        setattr(tokenizer, f"{name}_token", None)
    tokenizer.pad_token = "[SEP]"
    with pytest.raises(
        ValueError, match="a text has no token; got 1 such texts, and a tokenizer that adds none"
    ):
        fill_empty(tokenizer, dict(tokenizer(["good", ""])))


def test_an_adapted_table_of_tokens_has_its_rows(tmp_path: Path) -> None:
    model = tiny_model("bert")
    inject_lora(model, LoRAConfig(rank=2, target_modules=["word_embeddings", "position_embeddings"]))
    assert (vocabulary_rows(model), most_tokens(model)) == (64, 64)


def test_a_trainer_compares_a_model_of_ones_own(tmp_path: Path) -> None:
    model = tiny_model("bert")
    inject_lora(model, LoRAConfig(rank=2))
    args = LoRATrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(
        ValueError, match="tokens that the model has no embedding for; got 1, first 'w20' with id 64"
    ):
        LoRATrainer(model=model, args=args, processing_class=beyond(*(f"w{index}" for index in range(21))))


@pytest.mark.slow
def test_an_exported_graph_reads_texts_as_the_classifier_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    base = write_base(
        tmp_path / "base", "roberta", BertTokenizer(vocab=tiny_tokenizer().get_vocab()), type_vocab_size=1
    )
    model, tokenizer = load_classifier(base, LABELS)
    directory = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    classifier = TextClassifier.from_pretrained(directory, precision="fp32")
    export_onnx(classifier, tmp_path / "onnx")
    loaded, pairs = load_onnx(tmp_path / "onnx"), [("the film", "good"), ("good " * 90, "bad day")]
    assert loaded.tokenizer.model_max_length == 62
    torch.testing.assert_close(loaded.logits(pairs), classifier.logits(pairs), rtol=0, atol=1e-4)
