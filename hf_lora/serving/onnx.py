"""A TextClassifier that runs an exported graph on onnxruntime."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lora._files import MAX_JSON_BYTES, read_bytes
from hf_lora.adapters.info import FILE, AdapterInfo
from hf_lora.models.loading import meta_classifier
from hf_lora.models.reconcile import reconcile
from hf_lora.models.tokenizer_files import load_tokenizer_files, read_tokenizer
from hf_lora.serving.classifier import TextClassifier

MODEL, MODEL_INT8 = "model.onnx", "model_int8.onnx"


def onnx_package(name: str) -> Any:
    """A package that ONNX needs, imported when it is. Raises ValueError that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"ONNX needs a package that cannot be imported; got {str(error)!r}; expected {name}; "
            "try: pip install 'hf-lora[export]'"
        ) from error


class OnnxModel(nn.Module):
    """A session of onnxruntime that is called like a transformers classifier on the CPU."""

    def __init__(self, path: Path, config: Any) -> None:
        super().__init__()
        runtime = onnx_package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what fails raises; below that it is written to the terminal too
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        self.config = config
        self.device = torch.device("cpu")

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """The logits of a batch; what the graph has no input for is left out."""
        feed = {name: inputs[name].contiguous().numpy() for name in self.names}
        (logits,) = self.session.run(["logits"], feed)
        return SequenceClassifierOutput(logits=torch.from_numpy(logits))


class OnnxClassifier(TextClassifier):
    """The TextClassifier of a graph: the same batches, interpretation and results."""

    def __init__(
        self, path: Path, config: Any, tokenizer: PreTrainedTokenizerBase, info: AdapterInfo
    ) -> None:
        super().__init__(cast(PreTrainedModel, OnnxModel(path, config)), tokenizer, info)
        self.path = path

    @property
    def setting(self) -> str:
        """How the model runs, in one line for people."""
        return f"onnxruntime: {self.path.name}{self._temperature}"


def load_onnx(directory: str | Path, *, file: str = MODEL) -> OnnxClassifier:
    """The classifier of a directory that `hf-lora export` wrote. file: or "model_int8.onnx".

    Raises ValueError if it is not such a directory.
    """
    directory = Path(directory)
    for name in (file, FILE):
        if not (directory / name).is_file():
            raise ValueError(
                f"not an exported classifier; got {str(directory)!r} without {name}; expected a directory that "
                "`hf-lora export` wrote"
            )
    text = read_bytes(directory, FILE, limit=MAX_JSON_BYTES).decode("utf-8", "replace")
    info = AdapterInfo.from_json(text, str(directory / FILE))
    tokenizer = load_tokenizer_files(read_tokenizer(directory), str(directory))
    if tokenizer is None:
        raise ValueError(f"not an exported classifier; got {str(directory)!r} without a tokenizer")
    reconcile(meta_classifier(str(directory)), tokenizer)
    return OnnxClassifier(directory / file, AutoConfig.from_pretrained(directory), tokenizer, info)
