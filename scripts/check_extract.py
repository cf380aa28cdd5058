"""`hf-lora extract` on a fully fine-tuned encoder: does a low-rank adapter keep its accuracy?

Fine-tunes all of MiniLM for a short while with the plain Trainer, extracts an adapter at a kept energy, and
compares both on the held-out part. Exits with 1 if the accuracy falls by more than a point.

    python scripts/check_extract.py --train_file DATA --output_dir runs/extract
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_lora.cli.main import main as hf_lora
from hf_lora.data import DataConfig, prepare_data
from hf_lora.models.loading import load_base, load_tokenizer
from hf_lora.serving.classifier import TextClassifier


def main() -> int:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train_file", required=True, help="labelled texts")
    parser.add_argument("--output_dir", required=True, help="where model and adapter go; must not exist")
    parser.add_argument("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="pretrained encoder")
    parser.add_argument(
        "--energy", default="0.9", help="share of the squared singular values to keep (default: 0.9)"
    )
    parser.add_argument("--max_steps", type=int, default=75, help="steps of full fine-tuning (default: 75)")
    options = parser.parse_args()
    output = Path(options.output_dir)
    set_seed(42)
    tokenizer = load_tokenizer(options.base)
    data = prepare_data(DataConfig(train_file=options.train_file, max_length=64), tokenizer)
    set_seed(42)
    model, _ = load_base(options.base, data.labels)
    args = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=options.max_steps,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model=model, args=args, train_dataset=data.splits["train"], processing_class=tokenizer).train()
    model.eval().save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    extract = ["extract", "--base", options.base, "--finetuned", str(output / "model")]
    if code := hf_lora([*extract, "--energy", options.energy, "--output_dir", str(output / "adapter")]):
        return code
    # In the types of the base, as the fine-tuned model it is compared with.
    classifier = TextClassifier.from_pretrained(output / "adapter", precision=None)
    texts = list(data.texts["validation"][data.text_columns[0]])
    labels = np.asarray(data.splits["validation"]["labels"][:])
    predictions = {
        "fine-tuned": TextClassifier(model, classifier.tokenizer, classifier.info)
        .logits(texts)
        .argmax(-1)
        .numpy(),
        "extracted": classifier.logits(texts).argmax(-1).numpy(),
    }
    accuracy = {name: float((predicted == labels).mean()) for name, predicted in predictions.items()}
    same = float((predictions["fine-tuned"] == predictions["extracted"]).mean())
    size = (output / "adapter" / "adapter_model.safetensors").stat().st_size
    print(
        json.dumps(
            {"texts": len(texts), "accuracy": accuracy, "same_label": same, "adapter_bytes": size}, indent=2
        )
    )
    return 1 if accuracy["extracted"] < accuracy["fine-tuned"] - 0.01 else 0


if __name__ == "__main__":
    sys.exit(main())
