"""An adapter is trained, pushed to a Hub and loaded by its name in new processes with empty caches.

There hf_lora, peft and `pipeline` give the scores that they give here from the directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from fake_hub import FakeHub, folder_files
from tiny_run import HANGS
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from hf_lora import TextClassifier
from hf_lora.adapters.hub import adapter_contents
from hf_lora.adapters.info import FILE

ROOT = Path(__file__).parents[2]
TEXTS = ["the film was good and kind", "the meal was awful", "this day was bright but cold"]

LOAD = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from hf_lora import TextClassifier
from hf_lora.adapters.hub import adapter_directory

texts = json.loads(sys.argv[1])
classifier = TextClassifier.from_pretrained("me/tiny", precision="fp32", merge=False)
ours = classifier.logits(texts)
labels = json.loads((adapter_directory("me/tiny") / "hf_lora.json").read_text())["labels"]
fetched = sorted(path.name for path in adapter_directory("me/tiny").iterdir())

from peft import PeftModel
base = AutoModelForSequenceClassification.from_pretrained("org/tiny-bert", num_labels=2)
model = PeftModel.from_pretrained(base, "me/tiny").eval()
tokenizer = AutoTokenizer.from_pretrained("me/tiny")
with torch.no_grad():
    theirs = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits

model = AutoModelForSequenceClassification.from_pretrained(
    "me/tiny", num_labels=len(labels), id2label=dict(enumerate(labels))
)
classify = pipeline("text-classification", model=model, tokenizer="me/tiny")

from huggingface_hub import constants
constants.HF_HUB_OFFLINE = True
offline = TextClassifier.from_pretrained("me/tiny", precision="fp32", merge=False).logits(texts)
print(json.dumps({
    "ours": ours.tolist(), "peft": theirs.tolist(), "fetched": fetched,
    "pipeline": [(row["label"], row["score"]) for row in classify(texts)], "offline": offline.tolist(),
}))
"""


@pytest.mark.slow
def test_trained_pushed_and_loaded_by_name_elsewhere(tiny_bert_dir: Path, tiny_csv: Path, tmp_path: Path):
    with FakeHub() as hub:
        hub.publish("org/tiny-bert", folder_files(tiny_bert_dir))
        train = [
            *("--model_name_or_path", "org/tiny-bert", "--train_file", str(tiny_csv), "--precision", "fp32"),
            *(
                "--max_seq_length",
                "32",
                "--max_steps",
                "4",
                "--per_device_train_batch_size",
                "8",
                "--learning_rate",
                "5e-2",
                "--use_cpu",
            ),
            *("--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", "me/tiny"),
        ]
        result = elsewhere(hub, tmp_path / "one", "-m", "hf_lora.cli.main", "train", *train)
        assert result.returncode == 0, result.stderr
        repository = hub.repositories["me/tiny"]
        local = adapter_contents(tmp_path / "run")
        assert {path: repository.files()[path] for path in local} == local
        assert not [path for path in repository.files() if path.endswith((".pt", ".bin", ".pth"))]
        pushed = len(repository.history())
        push = ("push", "--adapter", str(tmp_path / "run"), "--repo_id", "me/tiny", "--json")
        result = elsewhere(hub, tmp_path / "one", "-m", "hf_lora.cli.main", *push)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout.splitlines()[-1])
        assert report["files"] == {path: len(content) for path, content in local.items()}
        assert report["commit"] == repository.refs["main"] and len(repository.history()) == pushed
        hub.publish("me/tiny", {**repository.files(), "model.safetensors": b"0" * 64, "sub/vocab.txt": b"x"})

        result = elsewhere(hub, tmp_path / "two", "-c", LOAD, json.dumps(TEXTS))
        assert result.returncode == 0, result.stderr
        loaded = json.loads(result.stdout.splitlines()[-1])
        assert loaded["fetched"] == sorted(set(local) & set(loaded["fetched"])) and FILE in loaded["fetched"]

    classifier = TextClassifier.from_pretrained(
        tmp_path / "run", base=str(tiny_bert_dir), precision="fp32", merge=False
    )
    logits = classifier.logits(TEXTS)
    assert_close(torch.tensor(loaded["ours"]), logits, rtol=0, atol=0)
    assert_close(torch.tensor(loaded["offline"]), logits, rtol=0, atol=0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    encoded = classifier.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**encoded).logits
    assert_close(torch.tensor(loaded["peft"]), expected, rtol=1e-5, atol=1e-6)
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    scores, labels = logits.softmax(-1).max(-1)
    names = [classifier.info.labels[index] for index in labels.tolist()]
    assert [row[0] for row in loaded["pipeline"]] == names
    assert_close(torch.tensor([row[1] for row in loaded["pipeline"]]), scores, rtol=1e-4, atol=1e-5)


def elsewhere(hub: FakeHub, home: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process whose Hub this is, with its own cache."""
    variables = {**os.environ, **hub.environment("hf_me", home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *argv], env=variables, capture_output=True, text=True, cwd=ROOT, timeout=HANGS
    )
