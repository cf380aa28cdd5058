from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import peft
import pytest
import torch
from conftest import LABELS, tiny_classifier, tiny_tokenizer
from helpers_serving import LONG, PAIRS, TEXTS, make_adapter, peft_logits, plain_logits
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_lora import (
    TextClassifier,
    head_parameters,
    lora_disabled,
    lora_layers,
    lora_parameters,
)
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.info import AdapterInfo
from hf_lora.lora.inject import base_parameters
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.loading import Precision
from hf_lora.serving import classifier as inference
from hf_lora.serving.encoding import CPU_TOKENS, WINDOW, encode
from hf_lora.serving.loading import _labels_of, load_trained


@pytest.fixture(scope="module")
def classifier(adapter_dir: Path) -> TextClassifier:
    # What these tests compare with computes in fp32, whatever this machine is good at.
    return TextClassifier.from_pretrained(adapter_dir, precision="fp32")


@pytest.fixture(scope="module")
def of_pairs(classifier: TextClassifier) -> TextClassifier:
    """The same classifier as one of pairs."""
    info = replace(classifier.info, text_columns=("premise", "hypothesis"))
    return TextClassifier(classifier.model, classifier.tokenizer, info)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path) -> Path:
    """The same architecture and tokenizer with other random weights."""
    directory = tmp_path_factory.mktemp("other_base")
    torch.manual_seed(99)
    AutoModel.from_config(AutoConfig.from_pretrained(tiny_bert_dir)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_logits_are_those_of_peft_one_by_one(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    expected = peft_logits(tiny_bert_dir, adapter_dir, TEXTS)
    for batch_size in (1, 4, 32):
        actual = classifier.logits(TEXTS, batch_size=batch_size)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    # Were the rows equal, their order could not be told.
    assert torch.pdist(expected).min() > 1e-3


def test_text_pairs_are_those_of_peft_one_by_one(
    of_pairs: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    expected = peft_logits(tiny_bert_dir, adapter_dir, PAIRS)
    torch.testing.assert_close(of_pairs.logits(PAIRS), expected, rtol=0, atol=1e-5)
    results = of_pairs.predict(PAIRS)
    assert [result["text"] for result in results] == [list(pair) for pair in PAIRS]
    scores = [[result["scores"][label] for label in LABELS] for result in results]
    torch.testing.assert_close(torch.tensor(scores), expected.softmax(-1), rtol=0, atol=1e-5)


def test_a_pair_is_one_prediction(of_pairs: TextClassifier) -> None:
    pair = PAIRS[0]
    columns = {"premise": pair[0], "hypothesis": pair[1], "label": "not read"}
    [expected] = of_pairs.predict([pair])
    assert expected["text"] == list(pair)
    assert of_pairs.predict(pair) == of_pairs.predict(columns) == expected
    for several in ([list(pair)], (pair,), [columns], iter([pair])):
        assert of_pairs.predict(several) == [expected]


def test_a_tuple_and_dictionaries_for_an_adapter_of_one_text(classifier: TextClassifier) -> None:
    expected = classifier.predict(["good", "bad"])
    assert classifier.predict(("good", "bad")) == expected
    assert classifier.predict([{"text": "good", "id": 1}, {"text": "bad"}]) == expected
    assert classifier.predict({"text": "good"}) == expected[0]


_HALF = r"not what the adapter was trained on; got one text, 'good'; expected a pair \(premise, hypothesis\)"
_WHOLE = r"not what the adapter was trained on; got a pair, .*; expected one text \(text\)"
_NO_TEXTS = "not texts; got .*; expected a string or a list of strings"


@pytest.mark.parametrize(
    ("kind", "texts", "words"),
    [
        ("of_pairs", "good", _HALF),
        ("of_pairs", ["good", "bad"], _HALF),
        ("of_pairs", ("good",), _HALF),
        ("of_pairs", [("good", "bad"), "bad"], "cannot be mixed"),
        (
            "of_pairs",
            {"premise": "good"},
            "got a dictionary with the keys .*; expected .* premise, hypothesis",
        ),
        ("of_pairs", {"premise": "good", "hypothesis": None}, "not a text"),
        ("classifier", [("good", "bad")], _WHOLE),
        ("classifier", [["good", "bad"]], _WHOLE),
        ("classifier", {"sentence": "good"}, "expected the adapter's columns text"),
        ("unknown", ("good", "bad"), "does not say whether it knows pairs; got the tuple .*; expected"),
        ("unknown", {"text": "good"}, "expected a string or a pair of strings"),
    ],
    ids=str,
)
def test_half_a_pair_and_what_could_be_either_are_refused(
    kind: str, texts: Any, words: str, classifier: TextClassifier, of_pairs: TextClassifier
) -> None:
    unknown = TextClassifier(
        classifier.model, classifier.tokenizer, replace(classifier.info, text_columns=())
    )
    asked = {"classifier": classifier, "of_pairs": of_pairs, "unknown": unknown}[kind]
    with pytest.raises(ValueError, match=words) as error:
        asked.predict(texts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["good", b"good", {"text": "good"}, 5], ids=str)
def test_one_text_is_no_list_of_letters(text: Any, classifier: TextClassifier) -> None:
    with pytest.raises(ValueError, match=_NO_TEXTS):
        classifier.logits(text)
    with pytest.raises(ValueError, match=_NO_TEXTS):
        list(classifier.predict_stream(text))


def test_predictions_are_softmax_in_the_order_of_the_input(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    probabilities = peft_logits(tiny_bert_dir, adapter_dir, TEXTS).softmax(-1)
    results = classifier.predict(TEXTS, batch_size=2)
    assert [result["text"] for result in results] == TEXTS
    for result, row in zip(results, probabilities, strict=True):
        assert list(result) == ["text", "label", "score", "scores"]
        assert result["scores"] == pytest.approx(dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-5)
        assert result["label"] == LABELS[int(row.argmax())]
        assert result["score"] == result["scores"][result["label"]]


def test_one_string_gives_one_result(classifier: TextClassifier) -> None:
    one = classifier.predict(TEXTS[1])
    assert isinstance(one, dict)
    [same] = classifier.predict([TEXTS[1]])
    assert one == same


def test_empty_list_gives_an_empty_list(classifier: TextClassifier) -> None:
    assert classifier.predict([]) == []
    assert classifier.logits([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([5], ["not a text", "got 5", "a string or a pair"]),
        (["good", None], ["not a text", "got None"]),
        ([("a", "b", "c")], ["not a text", "('a', 'b', 'c')"]),
        ([("a", 1)], ["not a text", "('a', 1)"]),
        (["good", ("a", "b")], ["single texts and text pairs", "mixed"]),
        (5, ["not", "text", "5"]),
        (None, ["not", "text", "None"]),
        (pandas.DataFrame({"text": ["good", "bad"]}), ["not texts; got a DataFrame", "one of its columns"]),
        (["good", "bad \ud83d"], ["not a text", r"'bad \ud83d'", "valid Unicode"]),
        ("bad \udcff", ["not a text", r"'bad \udcff'", "valid Unicode"]),
    ],
)
def test_anything_but_texts_is_refused(classifier: TextClassifier, texts: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        classifier.predict(texts)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(classifier: TextClassifier, batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        classifier.predict(TEXTS, batch_size=batch_size)


def test_stream_reads_one_window_ahead_at_most(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WINDOW == 2048
    monkeypatch.setattr(inference, "WINDOW", 4)
    read: list[str] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(TEXTS[len(read) % len(TEXTS)])
            yield read[-1]

    stream = classifier.predict_stream(endless())
    assert read == []
    seen = []
    for count in range(1, 10):
        seen.append(next(stream)["text"])
        # Windows of 4: the first to fourth result need 4 texts, the fifth to eighth need 8, ...
        assert len(read) == 4 * ((count + 3) // 4)
    assert seen == read[:9]


def test_stream_equals_predict(classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classifier.predict(TEXTS)
    monkeypatch.setattr(inference, "WINDOW", 4)
    parts = list(classifier.predict_stream(iter(TEXTS)))
    assert [result["text"] for result in parts] == TEXTS
    for one, other in zip(parts, whole, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)


def test_directory_alone_restores_everything(classifier: TextClassifier, tiny_bert_dir: Path) -> None:
    assert classifier.info.labels == LABELS
    assert classifier.info.max_length == 32
    assert classifier.info.text_columns == ("text",)
    assert classifier.info.base_model.name_or_path == str(tiny_bert_dir)
    assert classifier.model.config.id2label == dict(enumerate(LABELS))
    assert classifier.model.config.label2id == {"negative": 0, "positive": 1}
    assert classifier.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert not classifier.model.training


def test_multi_label_scores_are_sigmoids_and_labels_those_above_half(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    labels = ("food", "travel", "mood", "other")
    kind = "multi_label_classification"
    directory = make_adapter(tiny_bert_dir, tmp_path / "multi", labels, problem_type=kind, max_length=32)
    expected = peft_logits(tiny_bert_dir, directory, TEXTS).sigmoid()
    assert (expected >= 0.5).any() and (expected < 0.5).any()
    for result, row in zip(
        TextClassifier.from_pretrained(directory, precision="fp32").predict(TEXTS),
        expected.tolist(),
        strict=True,
    ):
        assert result["scores"] == pytest.approx(dict(zip(labels, row, strict=True)), abs=1e-5)
        chosen = [label for label, score in zip(labels, row, strict=True) if score >= 0.5]
        assert result["label"] == chosen
        assert result["score"] == [result["scores"][label] for label in chosen]


def test_calibration_of_the_sidecar_is_used(tiny_bert_dir: Path, tmp_path: Path, adapter_dir: Path) -> None:
    kind = "multi_label_classification"
    directory = make_adapter(
        tiny_bert_dir, tmp_path / "multi", ("a", "b", "c"), problem_type=kind, max_length=32
    )
    logits = peft_logits(tiny_bert_dir, directory, TEXTS)
    scores = (logits / 3).sigmoid()
    # Cut in the middle of each column, so that every label is given to some and not to others.
    thresholds = scores.sort(0).values[2:4].mean(0)
    recalibrate(directory, temperature=3.0, thresholds=thresholds.tolist())
    classifier = TextClassifier.from_pretrained(directory, precision="fp32")
    torch.testing.assert_close(classifier.logits(TEXTS), logits, rtol=0, atol=1e-5)
    results = classifier.predict(TEXTS)
    torch.testing.assert_close(
        torch.tensor([list(result["scores"].values()) for result in results]), scores, rtol=0, atol=1e-5
    )
    given = [[label in result["label"] for label in "abc"] for result in results]
    assert given == (scores > thresholds).tolist() != (logits > 0).tolist()
    assert classifier.setting.endswith("; temperature 3")
    # Single-label: other scores, the same labels.
    one = shutil.copytree(adapter_dir, tmp_path / "single")
    recalibrate(one, temperature=0.1)
    expected = (peft_logits(tiny_bert_dir, one, TEXTS) / 0.1).softmax(-1)
    sharp = TextClassifier.from_pretrained(one, precision="fp32").predict(TEXTS)
    plain = TextClassifier.from_pretrained(adapter_dir, precision="fp32").predict(TEXTS)
    assert [result["label"] for result in sharp] == [result["label"] for result in plain]
    assert [result["score"] for result in sharp] == pytest.approx(expected.max(1).values.tolist(), abs=1e-4)
    assert max(abs(s["score"] - p["score"]) for s, p in zip(sharp, plain, strict=True)) > 0.01


def recalibrate(adapter: Path, **values: Any) -> None:
    """Write fields into the sidecar of an adapter."""
    path = adapter / "hf_lora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_flips_are_other_labels_of_predict() -> None:
    info = AdapterInfo(("a", "b"), "multi_label_classification", temperature=2.0, thresholds=(0.9, 0.5))
    plain = AdapterInfo(("a", "b"), info.problem_type)
    # sigmoid(4.4 / 2) is just above 0.9, sigmoid(4.3 / 2) below it; 1 and -1 decide otherwise at one half alone.
    before, after = np.array([[4.4, 0.0], [1.0, 1.0]]), np.array([[4.3, 0.0], [-1.0, 2.0]])
    assert info.task.changed(before, after, info.calibration) == 1
    assert info.task.changed(before, after, plain.calibration) == 1
    assert info.task.changed(before[:1], after[:1], plain.calibration) == 0


def test_regression_score_is_the_output_itself(tiny_bert_dir: Path, tmp_path: Path) -> None:
    directory = make_adapter(
        tiny_bert_dir, tmp_path / "regression", ("stars",), problem_type="regression", max_length=32
    )
    expected = peft_logits(tiny_bert_dir, directory, TEXTS)[:, 0].tolist()
    results = TextClassifier.from_pretrained(directory, precision="fp32").predict(TEXTS)
    assert [result["label"] for result in results] == ["stars"] * len(TEXTS)
    assert [result["score"] for result in results] == pytest.approx(expected, abs=1e-5)
    assert [result["scores"] for result in results] == [{"stars": result["score"]} for result in results]


def test_without_max_length_texts_are_cut_where_the_positions_end(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    directory = make_adapter(tiny_bert_dir, tmp_path / "adapter", LABELS)
    assert len(tiny_tokenizer()(LONG)["input_ids"]) > 64
    expected = peft_logits(tiny_bert_dir, directory, [LONG], max_length=64)
    actual = TextClassifier.from_pretrained(directory, precision="fp32").logits([LONG])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_bare_peft_directory_gets_numbered_labels(
    classifier: TextClassifier, adapter_dir: Path, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter_dir / name, tmp_path / name)
    bare = TextClassifier.from_pretrained(tmp_path, precision="fp32")
    assert bare.info.labels == ("LABEL_0", "LABEL_1")
    # The longest text is cut at another length: the bare directory does not know of 32.
    short = [text for text in TEXTS if text != LONG]
    torch.testing.assert_close(bare.logits(short), classifier.logits(short), rtol=0, atol=1e-6)


def test_base_may_be_in_another_place(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_bert_dir, tmp_path / "moved")
    other = TextClassifier.from_pretrained(adapter_dir, base=str(moved), precision="fp32")
    torch.testing.assert_close(other.logits(TEXTS), classifier.logits(TEXTS), rtol=0, atol=0)


def test_other_weights_are_refused_with_both_fingerprints(adapter_dir: Path, other_base: Path) -> None:
    trained_on = json.loads((adapter_dir / "hf_lora.json").read_text())["base_model"]["fingerprint"]
    encoder = AutoModel.from_pretrained(other_base)
    given = fingerprint({f"bert.{name}": tensor for name, tensor in encoder.named_parameters()})
    with pytest.raises(ValueError, match="not the one the adapter") as error:
        TextClassifier.from_pretrained(adapter_dir, base=str(other_base))
    assert [words for words in (trained_on, given, "check_base=False") if words not in str(error.value)] == []
    assert trained_on != given


def test_check_base_false_takes_other_weights(adapter_dir: Path, other_base: Path) -> None:
    options = {"base": str(other_base), "check_base": False, "precision": "fp32"}
    classifier = TextClassifier.from_pretrained(adapter_dir, **options)
    expected = peft_logits(other_base, adapter_dir, TEXTS)
    torch.testing.assert_close(classifier.logits(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_merged_or_not_the_logits_are_those_of_peft(
    merge: bool, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    classifier = TextClassifier.from_pretrained(adapter_dir, merge=merge, precision="fp32")
    assert classifier.merged is merge
    assert ("merged into the weights" in classifier.setting) is merge
    expected = peft_logits(tiny_bert_dir, adapter_dir, TEXTS)
    torch.testing.assert_close(classifier.logits(TEXTS), expected, rtol=0, atol=1e-5)


def test_bf16_differs_by_its_rounding_and_no_clear_label_does(tiny_bert_dir: Path, tmp_path: Path) -> None:
    directory = make_adapter(tiny_bert_dir, tmp_path / "adapter", ("a", "b", "c"), max_length=32)
    classifier = TextClassifier.from_pretrained(directory, precision="bf16")
    texts = [f"{first} {second}" for first in TEXTS for second in TEXTS]
    expected, actual = peft_logits(tiny_bert_dir, directory, texts), classifier.logits(texts)
    assert actual.dtype == torch.float32
    # What bf16 costs: the same model, merged by peft and cast as a whole.
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    plain = PeftModel.from_pretrained(base, directory).merge_and_unload().eval().to(torch.bfloat16)
    bound = 1.5 * (plain_logits(plain, texts).float() - expected).abs().max()
    assert 0 < (actual - expected).abs().max() < bound < 0.5 * expected.std()
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * bound
    assert clear.sum() > len(texts) / 2 and len(expected[clear].argmax(-1).unique()) > 1
    assert torch.equal(actual[clear].argmax(-1), expected[clear].argmax(-1))


def test_in_bf16_head_and_adapter_stay_fp32(adapter_dir: Path) -> None:
    classifier = TextClassifier.from_pretrained(adapter_dir, precision="bf16")
    assert classifier.precision == Precision("bf16", "as asked for")
    assert classifier.setting == "precision: bf16 (as asked for); the adapter merged into the weights"
    kept = {*head_parameters(classifier.model).values(), *lora_parameters(classifier.model).values()}
    for name, parameter in classifier.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter in kept else torch.bfloat16), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_disabled_on_the_merged_and_cast_model_is_the_head_on_the_base(
    precision: str, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    classifier = TextClassifier.from_pretrained(adapter_dir, precision=precision)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2).eval()
    plain.classifier.load_state_dict(classifier.model.classifier.state_dict())
    expected, before = plain_logits(plain, TEXTS), classifier.logits(TEXTS)
    tolerance = {"fp32": 1e-5, "bf16": 0.02 * expected.std().item()}[precision]
    with lora_disabled(classifier.model):
        torch.testing.assert_close(classifier.logits(TEXTS), expected, rtol=0, atol=tolerance)
    assert torch.equal(classifier.logits(TEXTS), before)
    assert (before - expected).abs().max() > 10 * tolerance
    trained_on = classifier.info.base_model.fingerprint
    assert fingerprint(base_parameters(classifier.model)) == trained_on


@pytest.mark.parametrize("instruction", ["amx_bf16", None])
def test_auto_takes_what_the_hardware_is_good_at(
    instruction: str | None, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    classifier = TextClassifier.from_pretrained(adapter_dir, device="cpu")
    assert classifier.precision is not None and classifier.merged
    assert classifier.precision.name == ("fp32" if instruction is None else "bf16")
    assert classifier.model.dtype == classifier.precision.dtype


@pytest.fixture
def bf16_base(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    AutoModel.from_pretrained(tiny_bert_dir).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tiny_tokenizer().save_pretrained(tmp_path / "bf16")
    return tmp_path / "bf16"


def test_a_base_stored_in_bf16_is_merged_in_fp32_if_that_is_wanted(bf16_base: Path, tmp_path: Path) -> None:
    directory = make_adapter(bf16_base, tmp_path / "adapter", LABELS, max_length=32)
    classifier = TextClassifier.from_pretrained(directory, precision="fp32")
    stored = AutoModel.from_pretrained(bf16_base, dtype=torch.float32).state_dict()
    for name, layer in lora_layers(classifier.model).items():
        exact = stored[f"{name.removeprefix('bert.')}.weight"] + layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(layer.weight, exact, rtol=1e-6, atol=1e-7)
        assert not torch.equal(layer.weight, exact.to(torch.bfloat16).float())


def test_without_a_precision_the_base_keeps_its_types(
    bf16_base: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    directory = make_adapter(bf16_base, tmp_path / "adapter", LABELS, max_length=32)
    for path, dtype in ((directory, torch.bfloat16), (adapter_dir, torch.float32)):
        classifier = TextClassifier.from_pretrained(path, precision=None)
        assert classifier.precision is None and classifier.model.dtype == dtype
        assert classifier.model.classifier.weight.dtype == torch.float32
        assert classifier.setting.startswith("precision: as the model was loaded; ")


class _Quantized(torch.nn.Parameter):
    """Stands in for torchao's tensors, which are told by where their type comes from."""

    def dequantize(self) -> Tensor:
        return self.data


_Quantized.__module__ = "torchao.stand_in"


def test_a_quantized_base_runs_as_it_is(adapter_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TextClassifier.from_pretrained(adapter_dir, precision="fp32").logits(TEXTS)
    original = inference.load_trained

    def loaded(*args: Any, **options: Any) -> Any:
        model, tokenizer, info = original(*args, **options)
        query = model.bert.encoder.layer[0].intermediate.dense
        query.weight = _Quantized(query.weight.data, requires_grad=False)
        return model, tokenizer, info

    monkeypatch.setattr(inference, "load_trained", loaded)
    classifier = TextClassifier.from_pretrained(adapter_dir)
    assert classifier.precision is None and not classifier.merged
    assert classifier.setting == "precision: as the model was loaded; the adapter beside the weights"
    torch.testing.assert_close(classifier.logits(TEXTS), plain, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"is quantized .* got precision='bf16'; expected 'auto'"):
        TextClassifier.from_pretrained(adapter_dir, precision="bf16")


def shapes_of(classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes `(rows, tokens)` of all batches that the model gets from now on."""
    shapes: list[torch.Size] = []
    forward = classifier.model.forward

    def spy(*args: Any, **inputs: Any) -> Any:
        assert all(tensor.shape == inputs["input_ids"].shape for tensor in inputs.values())
        shapes.append(inputs["input_ids"].shape)
        return forward(*args, **inputs)

    monkeypatch.setattr(classifier.model, "forward", spy)
    return shapes


def short_texts(count: int) -> list[str]:
    """Texts of 1 to 25 words, no two neighbours of the same length."""
    words = tiny_tokenizer().convert_ids_to_tokens(range(5, 40))
    return [" ".join(words[(row + i) % 35] for i in range(1 + row * 7 % 25)) for row in range(count)]


@pytest.mark.slow
def test_many_short_texts_are_never_more_than_the_budget_at_once(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = short_texts(10_000)
    shapes = shapes_of(classifier, monkeypatch)
    results = classifier.predict(texts)
    assert max(rows * tokens for rows, tokens in shapes) <= CPU_TOKENS == 2048
    assert sum(rows for rows, _ in shapes) == len(texts)
    # Sorted, so that next to nothing is computed for padding.
    computed = sum(rows * tokens for rows, tokens in shapes)
    assert computed < 1.1 * sum(len(text.split()) + 2 for text in texts)
    assert [result["text"] for result in results] == texts
    some = range(0, len(texts), 997)
    alone = torch.tensor([list(classifier.predict(texts[row])["scores"].values()) for row in some])
    together = torch.tensor([list(results[row]["scores"].values()) for row in some])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_number_of_texts(classifier: TextClassifier) -> None:
    def peak_after(count: int) -> float:
        Path("/proc/self/clear_refs").write_text("5")
        for _ in classifier.predict_stream(iter(short_texts(count))):
            pass
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024

    few = peak_after(2 * WINDOW)
    # The texts themselves are 2 MB; ten windows of activations kept would be 200 MB more.
    assert peak_after(10 * WINDOW) < few + 20


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_size_is_kept(
    batch_size: int, classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = shapes_of(classifier, monkeypatch)
    classifier.logits(TEXTS, batch_size=batch_size)
    whole, rest = divmod(len(TEXTS), batch_size)
    assert [rows for rows, _ in shapes] == [batch_size] * whole + [rest] * bool(rest)


def test_a_text_longer_than_the_budget_goes_alone(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = classifier.logits(TEXTS)
    monkeypatch.setattr(inference, "CPU_TOKENS", 10)
    shapes = shapes_of(classifier, monkeypatch)
    torch.testing.assert_close(classifier.logits(TEXTS), expected, rtol=0, atol=1e-5)
    assert shapes[0] == (1, 32) and max(rows * tokens for rows, tokens in shapes[2:]) <= 10


def test_a_trained_directory_needs_no_other_argument(adapter_dir: Path) -> None:
    model, tokenizer, info = load_trained(adapter_dir)
    assert info.labels == LABELS and info.max_length == 32 and not model.training
    assert tokenizer("the film").input_ids[0] == tokenizer.cls_token_id


def test_a_foreign_adapter_gets_numbered_labels(adapter_dir: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((adapter_dir / name).read_bytes())
    model, _, info = load_trained(foreign)
    assert info.labels == ("LABEL_0", "LABEL_1") and model.config.num_labels == 2


def test_an_adapter_without_a_base_asks_for_it(adapter_dir: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    (foreign / "adapter_model.safetensors").write_bytes(
        (adapter_dir / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="names no base model; pass base="):
        load_trained(foreign)


def foreign(base: Any, place: Path, tmp_path: Path, **options: Any) -> Path:
    """An adapter of peft on a base model that is saved at `place`; `options` are LoraConfig's."""
    base.save_pretrained(place)
    theirs = peft.get_peft_model(type(base).from_pretrained(place), peft.LoraConfig(r=2, **options))
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_labels_of_a_foreign_adapter_are_counted_where_the_head_ends(tmp_path: Path) -> None:
    # The pooler is a part of this head, and comes after the layer with the outputs.
    options = {"target_modules": ["query_proj"], "modules_to_save": ["classifier", "pooler"]}
    adapter = foreign(tiny_classifier("deberta-v2", num_labels=5), tmp_path / "base", tmp_path, **options)
    files = read_adapter(adapter)
    assert _labels_of(files, str(tmp_path / "base")) == tuple(f"LABEL_{index}" for index in range(5))


def test_an_adapter_without_a_head_uses_that_of_its_base(tiny_bert_dir: Path, tmp_path: Path) -> None:
    base = tiny_classifier(id2label={0: "a", 1: "b", 2: "c"})
    adapter = foreign(base, tmp_path / "base", tmp_path, target_modules=["query"])
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, _, info = load_trained(adapter)
    assert info.labels == ("a", "b", "c")
    assert torch.equal(model.classifier.weight, base.classifier.weight)
    with pytest.raises(
        ValueError, match=r"neither the adapter .* has weights for 2 tensors, .*classifier\.bias"
    ):
        load_trained(adapter, base=str(tiny_bert_dir))


def test_an_adapter_of_another_task_is_refused_before_its_base_is_loaded(tmp_path: Path) -> None:
    base = AutoModelForTokenClassification.from_config(tiny_classifier().config)
    adapter = foreign(base, tmp_path / "base", tmp_path, target_modules=["query"], task_type="TOKEN_CLS")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(
        ValueError, match="is for token classification, such as NER; got task_type='TOKEN_CLS'"
    ):
        load_trained(adapter)


@pytest.mark.parametrize("own", [True, False])
def test_a_base_that_moved_names_the_way_out(own: bool, adapter_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_dir, tmp_path / "adapter")
    for name in ("adapter_config.json", "hf_lora.json"):
        values = json.loads((folder / name).read_text())
        values |= {"sha256": {}} if name == "hf_lora.json" else {"base_model_name_or_path": "/moved/base"}
        values.get("base_model", {})["name_or_path"] = "/moved/base"
        (folder / name).write_text(json.dumps(values))
    if not own:
        (folder / "hf_lora.json").unlink()
    with pytest.raises(
        (OSError, ValueError), match=r"^the base model '/moved/base' of .*\(--base\)$"
    ) as caught:
        load_trained(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises((OSError, ValueError)) as caught:
        load_trained(folder, base="/also/gone")
    assert "--base" not in str(caught.value)


@pytest.mark.parametrize("positions", [0, -1, 64])
def test_a_tokenizer_without_a_limit_truncates_to_the_positions_if_there_are_any(
    positions: int, classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "info", replace(classifier.info, max_length=None))
    monkeypatch.setattr(classifier.tokenizer, "model_max_length", 10**30)
    monkeypatch.setattr(classifier.model.config, "max_position_embeddings", positions)
    (row,) = encode(classifier.tokenizer, [" ".join(["good"] * 100)], (), classifier.longest)["input_ids"]
    assert len(row) == (102 if positions < 1 else positions)
