from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_classifier, tiny_tokenizer
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer

from hf_lora import LoRAConfig, TextClassifier, inject_lora, merge_lora
from hf_lora.adapters.info import FILE, AdapterInfo
from hf_lora.lora.inject import lora_layers
from hf_lora.serving import export
from hf_lora.serving.export import PROBES, TOLERANCE, Export, export_onnx
from hf_lora.serving.onnx import MODEL, MODEL_INT8, load_onnx, onnx_package

REASON = "the packages of hf-lora[export] are not installed"
onnx = pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
BOTH = ("input_ids", "attention_mask")
# Every model type with its inputs; between them, every problem type, both forms, merged and not.
CASES: dict[str, dict[str, Any]] = {
    "bert": {"inputs": (*BOTH, "token_type_ids"), "problem": SINGLE, "merged": True},
    "roberta": {"inputs": BOTH, "problem": MULTI},
    "distilbert": {"inputs": BOTH, "problem": REGRESSION},
    "mpnet": {"inputs": BOTH, "problem": SINGLE, "form": "parametrization"},
    "albert": {"inputs": (*BOTH, "token_type_ids"), "problem": SINGLE},
}
# As fitted on held-out texts: what is compared with torch is what `predict` gives.
CALIBRATION: dict[str, dict[str, Any]] = {
    SINGLE: {"temperature": 0.25},
    MULTI: {"temperature": 2.5, "thresholds": (0.53, 0.5, 0.47)},
    REGRESSION: {},
}
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 5), (3, 31), (7, 16), (4, 50))
NAMES = ("first", "second", "third")


@dataclass
class Case:
    classifier: TextClassifier
    inputs: tuple[str, ...]
    done: Export
    before: dict[str, torch.Tensor]
    attention: str


def make_classifier(
    model_type: str, inputs: tuple[str, ...], problem: str, form: str = "module", merged: bool = False
) -> TextClassifier:
    # One block: exporting takes time by the node.
    blocks = {"n_layers" if model_type == "distilbert" else "num_hidden_layers": 1}
    names = dict(enumerate(NAMES))
    model = tiny_classifier(model_type, problem_type=problem, id2label=names, pad_token_id=0, **blocks)
    model.config.label2id = {name: index for index, name in enumerate(NAMES)}
    inject_lora(model, LoRAConfig(rank=2, form=form))
    randomize(model, 0.3)
    for name, parameter in model.named_parameters():
        if name in ("classifier.weight", "classifier.out_proj.weight"):
            parameter.data.normal_(std=0.4, generator=torch.Generator().manual_seed(6))
    if merged:
        merge_lora(model)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = list(inputs)
    return TextClassifier(
        model, tokenizer, AdapterInfo(NAMES, problem, max_length=32, **CALIBRATION[problem])
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The export of a model type, made once."""

    @cache
    def export_once(model_type: str) -> Case:
        classifier = make_classifier(model_type, **CASES[model_type])
        before = {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}
        attention = classifier.model.config._attn_implementation
        done = export_onnx(classifier, tmp_path_factory.mktemp("exports") / model_type, int8=True)
        return Case(classifier, CASES[model_type]["inputs"], done, before, attention)

    return export_once


@pytest.fixture(params=["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])])
def case(request: pytest.FixtureRequest, exported: Callable[[str], Case]) -> Case:
    return exported(request.param)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, exported: Callable[[str], Case]) -> TextClassifier:
    """A classifier whose graph is there already, for tests in which it is not the exporter that counts."""
    graph = exported("bert").done.directory / MODEL
    monkeypatch.setattr(export, "_write_graph", lambda model, example, path: shutil.copy(graph, path))
    return make_classifier("bert", **CASES["bert"])


def batch(inputs: tuple[str, ...], rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random ids; each row is padded by one place more than the one before."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(5, 44, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, max(1, length - row) :] = 0
    types = torch.randint(0, 2, (rows, length), generator=generator)
    made = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types * mask}
    return {name: made[name] for name in inputs}


def run(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """By hand, without anything of hf_lora."""
    session = onnxruntime.InferenceSession(str(path))
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(logits)


def test_logits_are_those_of_torch_for_every_shape(case: Case) -> None:
    for rows, length in SHAPES:
        inputs = batch(case.inputs, rows, length)
        with torch.no_grad():
            expected = case.classifier.model(**inputs).logits
        assert expected.abs().max() > 0.02  # 200 times what is allowed
        assert_close(run(case.done.directory / MODEL, inputs), expected, atol=1e-4, rtol=0)


def test_inputs_and_outputs_have_names_and_dynamic_axes(case: Case) -> None:
    graph = onnx.load(case.done.directory / MODEL).graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes == {
        **{name: ["batch_size", "sequence_length"] for name in case.inputs},
        "logits": ["batch_size", 3],
    }
    assert case.done.inputs == case.inputs


def test_the_graph_has_no_trace_of_this_machine_or_of_lora(case: Case) -> None:
    content = (case.done.directory / MODEL).read_bytes()
    for trace in (b"site-packages", b"modeling_", str(Path(export.__file__).parent).encode(), b"lora_"):
        assert trace not in content


def test_config_tokenizer_and_labels_are_beside_it(case: Case) -> None:
    directory, info = case.done.directory, case.classifier.info
    config = AutoConfig.from_pretrained(directory)
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert config.problem_type == info.problem_type
    assert config.architectures == [type(case.classifier.model).__mro__[0].__name__]
    assert json.loads((directory / FILE).read_text())["labels"] == list(NAMES)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("the film was good") == case.classifier.tokenizer("the film was good")
    # Who reads tokenizer.json alone cuts texts as this classifier does.
    assert json.loads((directory / "tokenizer.json").read_text())["truncation"]["max_length"] == 32
    assert sorted(path.suffix for path in directory.glob("model*")) == [".onnx", ".onnx"]


def test_the_report_is_what_the_files_give(case: Case) -> None:
    texts, info = list(PROBES), case.classifier.info
    expected = case.classifier.logits(texts)
    assert_close(case.done.logits["torch"], expected, atol=1e-4, rtol=0)
    for name in (MODEL, MODEL_INT8):
        got = load_onnx(case.done.directory, file=name).logits(texts)
        assert_close(case.done.logits[name], got, atol=0, rtol=0)
        entry, reference = case.done.files[name], case.done.logits["torch"]
        assert entry.bytes == (case.done.directory / name).stat().st_size
        assert entry.largest_logit_difference == (got - reference).abs().max().item()
        if info.problem_type == REGRESSION:
            assert entry.largest_probability_difference is None and entry.changed_labels is None
            continue
        if info.problem_type == SINGLE:
            chances = [torch.softmax(part / 0.25, 1) for part in (got, reference)]
            changed = [np.argmax(part.numpy(), 1)[:, None] for part in (got, reference)]
        else:
            chances = [1 / (1 + torch.exp(-part / 2.5)) for part in (got, reference)]
            changed = [part.numpy() > CALIBRATION[MULTI]["thresholds"] for part in chances]
        difference = (chances[0] - chances[1]).abs().max().item()
        assert entry.largest_probability_difference == pytest.approx(difference, rel=1e-5, abs=1e-7)
        assert entry.changed_labels == int((changed[0] != changed[1]).any(1).sum())
    assert case.done.files[MODEL].largest_logit_difference < TOLERANCE


def test_int8_is_smaller_and_close(case: Case) -> None:
    exact, int8 = case.done.files[MODEL], case.done.files[MODEL_INT8]
    scale = max(1.0, case.done.logits["torch"].abs().max().item())
    # The weights are tiny here, the graph is not.
    operations = {node.op_type for node in onnx.load(case.done.directory / MODEL_INT8).graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= operations
    weights = [tensor.data_type for tensor in onnx.load(case.done.directory / MODEL_INT8).graph.initializer]
    assert weights.count(onnx.TensorProto.INT8) > 6
    assert exact.largest_logit_difference < int8.largest_logit_difference < 0.1 * scale


def test_the_classifier_is_as_it_was(case: Case) -> None:
    after = case.classifier.model.state_dict()
    assert list(after) == list(case.before)
    for name, tensor in case.before.items():
        assert_close(after[name], tensor, atol=0, rtol=0)
    merged = {layer.merged for layer in lora_layers(case.classifier.model).values()}
    assert merged == {CASES[case.classifier.model.config.model_type].get("merged", False)}
    assert case.classifier.model.config._attn_implementation == case.attention


def test_a_loaded_export_predicts_like_the_classifier(case: Case) -> None:
    loaded = load_onnx(case.done.directory)
    info = case.classifier.info
    assert (loaded.info.temperature, loaded.info.thresholds) == (info.temperature, info.thresholds)
    told = "" if info.temperature is None else f"; temperature {info.temperature:g}"
    assert loaded.setting == f"onnxruntime: model.onnx{told}"
    got, expected = loaded.predict(["good", "a bad day"]), case.classifier.predict(["good", "a bad day"])
    for one, other in zip(got, expected, strict=True):
        assert isinstance(one, dict) and isinstance(other, dict)
        assert one["label"] == other["label"] and one["text"] == other["text"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


@pytest.mark.slow
def test_the_largest_models_have_their_weights_in_a_file_beside_the_graph(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(export, "ONE_FILE", 0)
    classifier = make_classifier("bert", **CASES["bert"])
    done = export_onnx(classifier, tmp_path / "out", int8=True)
    # Nor do the libraries say anything.
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    assert logging.root.isEnabledFor(logging.CRITICAL)  # in the tests' process they are heard again
    names = {path.name: path.stat().st_size for path in done.directory.glob("model*")}
    assert set(names) == {MODEL, f"{MODEL}.data", MODEL_INT8, f"{MODEL_INT8}.data"}
    assert done.files[MODEL].bytes == names[MODEL] + names[f"{MODEL}.data"]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    inputs = batch(CASES["bert"]["inputs"], 3, 9)
    with torch.no_grad():
        expected = classifier.model(**inputs).logits
    assert_close(run(moved / MODEL, inputs), expected, atol=1e-4, rtol=0)


def test_pairs_of_texts_are_compared_as_pairs(quick: TextClassifier, tmp_path: Path) -> None:
    info = AdapterInfo(NAMES, max_length=32, text_columns=("first", "second"))
    classifier = TextClassifier(quick.model, quick.tokenizer, info)
    done = export_onnx(classifier, tmp_path / "out")
    pairs = list(zip(PROBES, reversed(PROBES), strict=True))
    assert_close(done.logits[MODEL], classifier.logits(pairs), atol=1e-4, rtol=0)


def assert_refused(classifier: TextClassifier, directory: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        export_onnx(classifier, directory, **options)
    assert "\n" not in str(error.value)
    assert list(directory.parent.iterdir()) == []


def test_another_graph_is_refused_and_nothing_is_left(quick: TextClassifier, tmp_path: Path) -> None:
    quick.model.classifier.bias.data[1] += 2e-4
    assert_refused(quick, tmp_path / "out", r"disagree; got logits that differ by 0\.0002")


def test_a_graph_that_gives_nan_is_refused(
    quick: TextClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nan(torch.nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.device, self.config = torch.device("cpu"), quick.model.config

        def forward(self, **inputs: torch.Tensor) -> argparse.Namespace:
            return argparse.Namespace(logits=torch.full((len(inputs["input_ids"]), 3), torch.nan))

    monkeypatch.setattr("hf_lora.serving.onnx.OnnxModel", Nan)
    assert_refused(quick, tmp_path / "out", "disagree; got logits that differ by inf")


def test_a_graph_that_only_fails_at_length_one_is_refused(
    quick: TextClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Texts alone would not find it: they have [CLS] and [SEP] at the least.
    forward = export.OnnxClassifier.__init__.__globals__["OnnxModel"].forward

    def broken(self: Any, **inputs: torch.Tensor) -> Any:
        output = forward(self, **inputs)
        if inputs["input_ids"].shape[1] == 1:
            output.logits = output.logits + 1
        return output

    monkeypatch.setattr("hf_lora.serving.onnx.OnnxModel.forward", broken)
    assert_refused(quick, tmp_path / "out", "disagree; got logits that differ by 1;")


def test_what_the_exporter_cannot_do_is_one_line(
    quick: TextClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        try:
            raise RuntimeError("no such operator\nand a page more")
        except RuntimeError as error:
            raise TypeError("Failed to export; see the report") from error

    monkeypatch.setattr(export, "_write_graph", fail)
    match = "BertForSequenceClassification cannot be exported to ONNX; got RuntimeError: no such operator;"
    assert_refused(quick, tmp_path / "out", match)


def test_weights_that_are_not_fp32_are_refused(quick: TextClassifier, tmp_path: Path) -> None:
    quick.model.classifier.to(torch.bfloat16)
    assert_refused(quick, tmp_path / "out", "only a classifier in fp32 is exported; got .*bfloat16")


def test_missing_packages_name_the_extra(
    quick: TextClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert_refused(quick, tmp_path / "out", r"expected onnxscript; try: pip install 'hf-lora\[export\]'")
    with pytest.raises(ValueError, match="expected nothing_like_it; try"):
        onnx_package("nothing_like_it")


def test_an_existing_directory_is_left_alone(quick: TextClassifier, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(ValueError, match=r"output_dir exists; got .*; expected a new directory"):
        export_onnx(quick, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_no_export_is_not_loaded(
    exported: Callable[[str], Case], tmp_path: Path, adapter_dir: Path
) -> None:
    with pytest.raises(ValueError, match=r"not an exported classifier; got .* without model\.onnx"):
        load_onnx(adapter_dir)
    shutil.copy(exported("bert").done.directory / MODEL, tmp_path)
    with pytest.raises(ValueError, match=r"without hf_lora\.json"):
        load_onnx(tmp_path)
