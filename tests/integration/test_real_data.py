"""An adapter trained on real articles through peft and back, through ONNX, and one extracted from full fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import MINILM
from data_sets import bbc_folder
from transformers import Trainer, TrainingArguments, set_seed

from hf_lora import TextClassifier
from hf_lora.cli.main import main as hf_lora
from hf_lora.data import ClassificationData, DataConfig, prepare_data
from hf_lora.models.loading import load_base, load_tokenizer
from hf_lora.serving.export import TOLERANCE, export_onnx
from hf_lora.serving.loading import load_trained
from hf_lora.serving.onnx import MODEL, load_onnx

pytestmark = pytest.mark.slow
LENGTH = 64


@pytest.fixture(scope="module")
def news(minilm: str) -> ClassificationData:
    return prepare_data(DataConfig(train_file=str(bbc_folder()), max_length=LENGTH), load_tokenizer(minilm))


@pytest.fixture(scope="module")
def texts(news: ClassificationData) -> list[str]:
    """The 223 articles that are held out."""
    return list(news.texts["validation"][news.text_columns[0]])


@pytest.fixture(scope="module")
def adapter(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter under the model's own head, which peft loads."""
    output = tmp_path_factory.mktemp("news") / "run"
    flags = f"--max_train_samples 240 --max_seq_length {LENGTH} --num_train_epochs 1 --pooling native"
    files = ["--train_file", str(bbc_folder()), "--output_dir", str(output)]
    assert hf_lora(["train", "--model_name_or_path", minilm, *files, *flags.split()]) == 0
    return str(output)


def test_peft_and_back_predicts_the_same(adapter: str, texts: list[str], tmp_path: Path) -> None:
    # As peft computes: the updates beside the weights, in the types of the base.
    ours = TextClassifier.from_pretrained(adapter, merge=False, precision=None)
    expected = ours.logits(texts)
    base, _ = load_base(MINILM, ours.info.labels, problem_type=ours.info.problem_type)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    theirs.save_pretrained(tmp_path)
    again, _, _ = load_trained(str(tmp_path), base=MINILM)
    for model in (theirs.base_model.model, again):
        logits = TextClassifier(model, ours.tokenizer, ours.info).logits(texts)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_onnx_gives_every_article_its_label(adapter: str, texts: list[str], tmp_path: Path) -> None:
    classifier = TextClassifier.from_pretrained(adapter, precision="fp32", device="cpu")
    done = export_onnx(classifier, tmp_path / "export", int8=True, texts=texts)
    assert done.files[MODEL].changed_labels == 0
    assert done.files[MODEL].largest_logit_difference <= TOLERANCE
    # Eight bits move a few articles between topics.
    assert all(file.changed_labels <= 0.02 * len(texts) for file in done.files.values())
    expected = [row["label"] for row in classifier.predict(texts)]
    assert [row["label"] for row in load_onnx(done.directory).predict(texts)] == expected


def test_an_adapter_extracted_from_full_fine_tuning_keeps_the_accuracy(
    minilm: str, news: ClassificationData, texts: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(minilm)
    set_seed(42)
    model, _ = load_base(minilm, news.labels)
    arguments = TrainingArguments(
        str(tmp_path / "checkpoints"),
        max_steps=75,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=news.splits["train"], processing_class=tokenizer
    )
    trainer.train()
    tuned, adapter = tmp_path / "model", tmp_path / "adapter"
    trainer.save_model(str(tuned))
    words = ["--base", minilm, "--finetuned", str(tuned), "--energy", "0.9", "--output_dir", str(adapter)]
    assert hf_lora(["extract", *words]) == 0
    # In the types of the base, as the fine-tuned model it is compared with.
    extracted = TextClassifier.from_pretrained(adapter, precision=None)
    labels = np.asarray(news.splits["validation"]["labels"][:])
    accuracy = {
        name: float((classifier.logits(texts).argmax(-1).numpy() == labels).mean())
        for name, classifier in (
            ("tuned", TextClassifier(model.eval(), tokenizer, extracted.info)),
            ("extracted", extracted),
        )
    }
    assert accuracy["tuned"] > 0.9 and accuracy["extracted"] >= accuracy["tuned"] - 0.01, accuracy
    assert (adapter / "adapter_model.safetensors").stat().st_size < 0.2 * (
        tuned / "model.safetensors"
    ).stat().st_size
