"""A merged classifier as a checkpoint of other libraries: transformers, sentence-transformers.

All of them give logits: the temperature is not in them.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hf_lora._files import write_text
from hf_lora.adapters.info import FILE
from hf_lora.models.pooling import CLS, HEAD, NATIVE, POOLINGS, PooledClassifier
from hf_lora.serving import pooled_classifier
from hf_lora.serving.classifier import TextClassifier
from hf_lora.serving.pooled_classifier import PooledConfig, PooledForSequenceClassification, PooledModel


def save_transformers(classifier: TextClassifier, folder: Path) -> None:
    """Write a merged classifier as a checkpoint of transformers.

    One with a pooled head brings the code of its class, and loads with `trust_remote_code=True` alone.
    """
    if isinstance(classifier.model, PooledClassifier):
        _with_code(classifier.model, PooledForSequenceClassification).save_pretrained(folder)
        _write_code(folder)
    else:
        classifier.model.save_pretrained(folder)
    classifier.tokenizer.save_pretrained(folder)


def check_sentence_transformers(classifier: TextClassifier) -> None:
    """Raise ValueError for a classifier that sentence-transformers has no modules for."""
    info, advice = classifier.info, "use --format safetensors-merged"
    if info.pooling == NATIVE:
        known = ", ".join(POOLINGS)
        raise ValueError(
            f"sentence-transformers has no module for the architecture's own head; got pooling={NATIVE!r}; expected "
            f"one of {known}; {advice}"
        )
    if len(info.text_columns) == 2:
        raise ValueError(f"sentence-transformers embeds one text; got a classifier of pairs; {advice}")


def save_sentence_transformers(classifier: TextClassifier, folder: Path) -> None:
    """Write a merged classifier with a pooled head for sentence-transformers, whose embeddings are then the logits.

    The modules are Transformer, Pooling and Dense without activation. A head on several layers brings the code of the
    class that gives their states, and loads with `trust_remote_code=True` alone. `hf_lora.json` has the labels.
    """
    check_sentence_transformers(classifier)
    model: Any = classifier.model
    encoder, head = model.base_model, getattr(model, HEAD)
    settings: dict[str, Any] = {"max_seq_length": classifier.longest, "do_lower_case": False}
    if len(model.layers) > 1:
        _with_code(model, PooledModel).save_pretrained(folder)
        _write_code(folder)
    else:
        encoder.save_pretrained(folder)
        if "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters:
            settings["model_args"] = {"add_pooling_layer": False}
    classifier.tokenizer.save_pretrained(folder)
    pooling = {"word_embedding_dimension": head.in_features, "pooling_mode_mean_tokens": model.pooling != CLS}
    dense = {"in_features": head.in_features, "out_features": head.out_features, "bias": True}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(
            [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
        )
    ]
    for name, values in {
        "modules.json": modules,
        "sentence_bert_config.json": settings,
        "1_Pooling/config.json": {**pooling, "pooling_mode_cls_token": model.pooling == CLS},
        "2_Dense/config.json": {**dense, "activation_function": "torch.nn.modules.linear.Identity"},
    }.items():
        write_text(folder / name, json.dumps(values, indent=2) + "\n")
    tensors = {"linear.weight": head.weight.detach(), "linear.bias": head.bias.detach()}
    safetensors.torch.save_file(tensors, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    # The digests are of the adapter's files, which are not here.
    write_text(folder / FILE, replace(classifier.info, sha256={}).to_json())


def _with_code(model: PooledClassifier, kind: type[PooledForSequenceClassification | PooledModel]) -> Any:
    """The model as one of the classes in `pooled_classifier`, with the same tensors."""
    own = model.config
    config = PooledConfig(
        encoder=model.base_model.config.to_dict(),
        layers=model.layers,
        pooling="cls" if model.pooling == CLS else "mean",
        hidden_size=own.hidden_size * len(model.layers),
        id2label=own.id2label,
        label2id=own.label2id,
        problem_type=own.problem_type,
        pad_token_id=own.pad_token_id,
        dtype=model.base_model.dtype,
    )
    place = Path(pooled_classifier.__file__).stem
    names = {"AutoModel": PooledModel, "AutoModelForSequenceClassification": PooledForSequenceClassification}
    config.auto_map = {"AutoConfig": f"{place}.{PooledConfig.__name__}"}
    config.auto_map |= {auto: f"{place}.{model_class.__name__}" for auto, model_class in names.items()}
    with torch.device("meta"):
        built = kind(config)
    start = "model.encoder." if kind is PooledForSequenceClassification else "encoder."
    tensors = {start + name: tensor for name, tensor in model.base_model.state_dict().items()}
    if kind is PooledForSequenceClassification:
        tensors |= {f"head.{name}": tensor for name, tensor in getattr(model, HEAD).state_dict().items()}
    built.load_state_dict(tensors, assign=True)
    return built


def _write_code(folder: Path) -> None:
    source = Path(pooled_classifier.__file__)
    write_text(folder / source.name, source.read_text("utf-8"))
