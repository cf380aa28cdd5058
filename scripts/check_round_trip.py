"""hf_lora -> peft -> hf_lora on real data: an adapter loaded in peft, saved by peft and loaded back predicts the same.

    python scripts/check_round_trip.py --adapter runs/demo --train_file DATA

DATA is what the adapter was trained on; the held-out part is predicted three times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from typing import Any

import peft
import torch

from hf_lora.data import DataConfig, prepare_data
from hf_lora.models.loading import load_base
from hf_lora.serving.classifier import TextClassifier, load_trained


def main() -> int:
    """Run the comparison from the command line; exits with 1 if a prediction differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", required=True, help="adapter directory")
    parser.add_argument("--train_file", required=True, help="the data it was trained on")
    options = parser.parse_args()
    # As peft computes: the updates beside the weights, in the types of the base.
    ours = TextClassifier.from_pretrained(options.adapter, merge=False, precision=None)
    info = ours.info
    data = prepare_data(
        DataConfig(train_file=options.train_file, max_length=info.max_length or 128), ours.tokenizer
    )
    texts = list(data.texts["validation"][data.text_columns[0]])
    base, _ = load_base(str(info.base_model.name_or_path), info.labels, problem_type=info.problem_type)
    theirs = peft.PeftModel.from_pretrained(base, options.adapter).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, _, _ = load_trained(folder, base=info.base_model.name_or_path)
    logits = {
        "hf_lora": ours.logits(texts),
        "peft": TextClassifier(theirs.base_model.model, ours.tokenizer, info).logits(texts),
        "hf_lora again": TextClassifier(model, ours.tokenizer, info).logits(texts),
    }
    expected = logits["hf_lora"]
    report: dict[str, Any] = {
        "texts": len(texts),
        "largest_difference": {name: (part - expected).abs().max().item() for name, part in logits.items()},
        "different_predictions": {
            name: int((part.argmax(-1) != expected.argmax(-1)).sum()) for name, part in logits.items()
        },
    }
    print(json.dumps(report, indent=2))
    torch.testing.assert_close(logits["peft"], expected, atol=1e-5, rtol=1e-5)
    return 1 if any(report["different_predictions"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
