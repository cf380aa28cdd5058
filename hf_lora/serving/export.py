"""A classifier as an ONNX graph for onnxruntime, compared with torch before anything is left on the disk."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lora._files import replacing, write_text
from hf_lora.adapters.info import FILE, AdapterInfo
from hf_lora.lora.inject import is_injected, lora_layers, merge_lora, unmerge_lora
from hf_lora.models._transformers_private import set_eager_attention
from hf_lora.models.pooling import blank_like, native_class
from hf_lora.serving.classifier import TextClassifier
from hf_lora.serving.encoding import Text
from hf_lora.serving.onnx import MODEL, MODEL_INT8, OnnxClassifier, onnx_package

# Of a logit, for logits up to 1; for greater ones in proportion, as rounding is.
TOLERANCE = 1e-4
# A protobuf file ends at 2 GiB; above this the weights go to a file beside the graph.
ONE_FILE = 1_900_000_000

# What may be an input. The graph takes those that the model and its tokenizer both know.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_DYNAMIC = {0: "batch_size", 1: "sequence_length"}
# Rows and length of the example that is traced: neither is 0 or 1, which the tracer takes for constants.
_TRACED = (2, 7)
# Shapes that texts rarely have, and where a graph that is not dynamic fails.
_SHAPES = ((1, 1), (1, 2), (2, 1), (5, 3))

_SENTENCES = (
    "Good.",
    "It was late.",
    "Nobody expected this, least of all the people who had planned it for years!",
    "Shares fell sharply after the bank cut its profit forecast for the third time in a year.",
    "The striker scored twice as the champions won the cup final.",
    "Why would anyone pay for a phone whose battery lasts for less than half a day?",
    "The minister told parliament that the bill would be withdrawn.",
    "What a lovely, warm and funny film; we have seen it three times already.",
    "I want my money back: it broke within a week, and nobody answers my letters.",
    "Der Zug nach Wien kam 20 Minuten zu früh; c'était une surprise.",
    "Please send the signed forms to the office by 17:30 on 3 May 2024.",
)
PROBES = (*_SENTENCES, " ".join(_SENTENCES), " ".join(3 * _SENTENCES))
"""Texts from one word to several hundred, for comparing where there are none of the user's own."""


def probes(info: AdapterInfo) -> list[Text]:
    """`PROBES`, as pairs for an adapter of text pairs."""
    return list(zip(PROBES, reversed(PROBES), strict=True)) if len(info.text_columns) == 2 else list(PROBES)


@dataclass(frozen=True)
class Compared:
    """An exported file beside torch, over all texts. A regression has no probabilities and no labels."""

    bytes: int
    largest_logit_difference: float
    largest_probability_difference: float | None
    changed_labels: int | None


@dataclass(frozen=True)
class Export:
    """What was written: the inputs of the graph, and each file by its name.

    logits: `(texts, labels)` of the compared texts, by "torch" and the names of the files.
    """

    directory: Path
    inputs: tuple[str, ...]
    files: Mapping[str, Compared]
    logits: Mapping[str, Tensor]


def export_onnx(
    classifier: TextClassifier,
    directory: str | Path,
    *,
    int8: bool = False,
    texts: Sequence[Text] | None = None,
) -> Export:
    """Write a classifier, its adapter merged, as `model.onnx` with config, tokenizer and labels beside it.

    The graph takes int64 `(batch_size, sequence_length)` and gives `logits`, fp32 `(batch_size, labels)`. optimum's
    ORTModelForSequenceClassification reads the layout. The classifier stays as it is.

    int8: also `model_int8.onnx`, by dynamic quantization: weights of 8 bits, activations as they come.
    texts: compared in torch and onnxruntime; None: `PROBES`.
    Raises ValueError if packages are missing, the directory exists, the classifier is not in fp32, the model cannot be
    exported, or logits differ by more than 1e-4. Nothing is then written.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"output_dir exists; got {str(directory)!r}; expected a new directory")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        onnx_package(package)
    info = classifier.info
    model = _plain(classifier.model)
    plain = TextClassifier(model, classifier.tokenizer, info)
    given = inspect.signature(model.forward).parameters.keys() & set(classifier.tokenizer.model_input_names)
    inputs = [name for name in _INPUTS if name in given]
    texts = probes(info) if texts is None else list(texts)
    logits = {"torch": plain.logits(texts)}
    with replacing(directory) as folder:
        with _one_line(f"{type(model).__name__} cannot be exported to ONNX"):
            _write_graph(model, _batch(plain, inputs, *_TRACED), folder / MODEL)
            onnx = OnnxClassifier(folder / MODEL, model.config, classifier.tokenizer, info)
            with torch.inference_mode():
                batches = [_batch(plain, inputs, *shape) for shape in _SHAPES]
                pairs = [(model(**batch).logits, onnx.model(**batch).logits) for batch in batches]
            logits[MODEL] = onnx.logits(texts)
        pairs.append((logits["torch"], logits[MODEL]))
        _check(max(_distance(*pair) for pair in pairs), logits["torch"])
        if int8:
            with _one_line(f"{type(model).__name__} cannot be quantized"):
                _write_int8(folder / MODEL, folder / MODEL_INT8)
                onnx = OnnxClassifier(folder / MODEL_INT8, model.config, classifier.tokenizer, info)
                logits[MODEL_INT8] = onnx.logits(texts)
        compared = {file: _compare(info, logits, folder, file) for file in logits if file != "torch"}
        model.config.save_pretrained(folder)
        classifier.tokenizer.save_pretrained(folder)
        # The digests are of the adapter's files, which are not here.
        write_text(folder / FILE, replace(info, sha256={}).to_json())
    return Export(directory, tuple(inputs), compared, logits)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU with the updates in its weights and attention by plain products, which runs everywhere."""
    types = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if types != ["torch.float32"]:
        raise ValueError(
            f"only a classifier in fp32 is exported; got {types}; "
            "load it with TextClassifier.from_pretrained(..., precision='fp32')"
        )
    config = deepcopy(model.config)
    set_eager_attention(config)
    config.architectures = [native_class(model).__name__]
    # Built anew: copies of parametrized modules share their class with the original.
    with torch.random.fork_rng(devices=[]):
        plain = blank_like(model, config)
    merge_now = is_injected(model) and not any(layer.merged for layer in lora_layers(model).values())
    if merge_now:
        merge_lora(model)
    try:
        # By attributes: a state_dict does not have a parametrized tensor as the forward sees it.
        plain.load_state_dict({name: attrgetter(name)(model).detach() for name in plain.state_dict()})
    finally:
        if merge_now:
            unmerge_lora(model)
    return plain.eval()


def _batch(classifier: TextClassifier, inputs: Sequence[str], rows: int, length: int) -> dict[str, Tensor]:
    """The beginning of a long probe, `rows` times: `(rows, length)` each, nothing padded."""
    encoded = classifier.tokenizer(PROBES[-1], truncation=True, max_length=64)
    return {name: torch.tensor(encoded[name][:length]).repeat(rows, 1) for name in inputs}


class _Logits(nn.Module):
    """The traced call: tensors in, one tensor out."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


@torch.no_grad()
def _write_graph(model: PreTrainedModel, example: Mapping[str, Tensor], path: Path) -> None:
    names = list(example)
    program: Any = torch.onnx.export(
        _Logits(model, names).eval(),
        tuple(example.values()),
        dynamo=True,
        verbose=False,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=(tuple(_DYNAMIC for _ in names),),
    )
    graph = program.model.graph
    nodes: list[Any] = list(graph.all_nodes())
    values = [value for node in nodes for value in node.outputs if not value.is_graph_output()]
    values += graph.initializers.values()
    for value in values:
        # Runtimes infer shapes themselves; the quantizer transposes weights and trips over those that are stored.
        value.shape = None
    for part in (*nodes, *values):
        # Where in the sources it comes from: half a megabyte, and the folders of this machine.
        part.metadata_props.clear()
        part.doc_string = None
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(path, external_data=size > ONE_FILE)


def _write_int8(source: Path, target: Path) -> None:
    quantization = onnx_package("onnxruntime.quantization")
    quantization.quantize_dynamic(
        str(source),
        str(target),
        weight_type=quantization.QuantType.QInt8,
        # A scale for every output: one for a whole matrix is that of its greatest outlier.
        per_channel=True,
        # Weights of 7 bits: sums of products of 8 saturate on CPUs without VNNI.
        reduce_range=True,
        use_external_data_format=len(list(source.parent.glob(f"{source.name}.*"))) > 0,
    )


def _distance(left: Tensor, right: Tensor) -> float:
    # NaN is as far away as can be; the greatest of a list with it could be anything.
    return (left - right).abs().nan_to_num(nan=torch.inf).max().item()


def _check(difference: float, logits: Tensor) -> None:
    allowed = TOLERANCE * max(1.0, logits.abs().max().item())
    if not difference <= allowed:
        raise ValueError(
            f"onnxruntime and torch disagree; got logits that differ by {difference:.2g}; expected at most "
            f"{allowed:.2g}; nothing was written; try another version of torch or onnxruntime, or a merged checkpoint"
        )


def _compare(info: AdapterInfo, logits: Mapping[str, Tensor], folder: Path, file: str) -> Compared:
    got, expected = logits[file], logits["torch"]
    task, classes = info.task, info.task.has_classes
    scores = (task.probabilities(part, info.calibration) for part in (got, expected))
    return Compared(
        bytes=sum(path.stat().st_size for path in folder.glob(f"{file}*")),
        largest_logit_difference=_distance(got, expected),
        largest_probability_difference=_distance(*scores) if classes else None,
        changed_labels=task.changed(got.numpy(), expected.numpy(), info.calibration) if classes else None,
    )


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Inside, libraries say nothing; where they fail, `what` with the cause becomes a ValueError."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        quiet = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise  # a full disk is not the model's fault
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
        raise ValueError(f"{what}; got {reason}; a merged checkpoint (hf-lora merge) may do") from error
    finally:
        logging.disable(disabled)
