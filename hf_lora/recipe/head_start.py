"""The start of a run: frozen features of all splits, a linear probe on them, and the head that LoRA begins with.

That head is the probe's regression with a stronger penalty. How far the features may move is set by the loss that they
start with (Ren et al. 2023, arXiv:2302.05779): from the best probe they hardly do, from a random head too far.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_lora._choices import unknown
from hf_lora.data.collation import is_stream, label_column, some_of
from hf_lora.lora.head import output_layer_in
from hf_lora.lora.inject import injection
from hf_lora.models.pooling import PooledClassifier, pooling_of
from hf_lora.models.verify import evaluating, relative_difference
from hf_lora.recipe.options import HEAD_INITS, HEAD_PENALTY
from hf_lora.tasks import task_of
from hf_lora.tasks.metrics import first_output
from hf_lora.tasks.probe import Probe, fit_probe
from hf_lora.training.distributed import on_first
from hf_lora.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)

# A linear layer that has seen so many examples changes little with more of them.
MAX_EXAMPLES = 50_000
_NEEDS, _EXPECTED = "a linear probe needs examples with labels", "expected a column 'labels' or 'label'"


@dataclass(frozen=True)
class WarmStart:
    """A probe, its outputs `(n, labels)` on the evaluation set, in its order (None where there is none), and a start.

    start: the same probe under a stronger penalty. It is less sure of itself, so that the gradients of LoRA come from
    all examples and not only from those that the probe has wrong. last_layer: whether the head read several layers,
    and reads the last one alone now. on_all: probe and start of training and evaluation set together, if asked for.
    """

    probe: Probe
    validation: np.ndarray | None
    start: Probe
    last_layer: bool = False
    on_all: tuple[Probe, Probe] | None = None

    @property
    def best(self) -> Probe:
        """The probe for examples of neither set: that of all examples, where there is one."""
        return self.probe if self.on_all is None else self.on_all[0]


def output_layer(model: Any) -> nn.Linear:
    """The linear layer whose outputs are the logits: the last one of the head that is as wide as they are.

    Raises ValueError where the head ends with anything else.
    """
    head = injection(model).head
    found = output_layer_in(model, head, model.config.num_labels)
    if found is None:
        raise ValueError(
            f"the head of a {type(model).__name__} has no linear output layer; got {', '.join(head) or 'no head'}; "
            "use head_init=random"
        )
    return found[1]


@contextmanager
def features_as_logits(layer: nn.Linear) -> Iterator[None]:
    """Inside, the model returns as its logits what goes into `layer`, token selection of its own included."""
    hook = layer.register_forward_hook(lambda module, inputs, output: inputs[0])
    try:
        yield
    finally:
        hook.remove()


def frozen_features(trainer: LoRATrainer, dataset: Any) -> np.ndarray:
    """The features `(n, width)` of a data set: one pass of the network as it is, in evaluation, without autograd."""
    with features_as_logits(output_layer(trainer.model)), trainer.predicting_unlabelled():
        return np.asarray(first_output(trainer.predict(dataset).predictions), np.float32)


def labelled_features(
    trainer: LoRATrainer, dataset: Any, *, training: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The features `(n, width)` and labels of a data set of any kind that Trainer takes, in its order.

    training: whether they are training examples, whose frozen prefix training need not run again if it is cached.
    Raises ValueError for a data set without labels.
    """
    examples = some_of(dataset, MAX_EXAMPLES) if training or is_stream(dataset) else dataset
    with features_as_logits(output_layer(trainer.model)), trainer.predicting_unlabelled(training):
        found = trainer.predict(examples)
    column = label_column(examples)
    labels = found.label_ids if column is None else np.asarray(column)
    if labels is None:
        raise ValueError(f"{_NEEDS}; got a data set without; {_EXPECTED}")
    return np.asarray(first_output(found.predictions), np.float32), labels


def fit_warm_start(
    trainer: LoRATrainer,
    penalty: float = HEAD_PENALTY,
    *,
    choose_layers: bool = False,
    on_all: bool = False,
) -> WarmStart:
    """Fit a probe on the trainer's training set, its penalty chosen on its evaluation set.

    penalty: by how much that of the start is stronger. choose_layers: the evaluation set says, too, whether a head that
    reads several layers had better read the last one alone, and the head is changed so: topics are told best by what a
    sentence encoder was trained to give, the tone of a text by what is below. on_all: fit both on the evaluation set
    too, for a model that is trained on it in the end. Every process has to call it; the first one fits.
    Raises ValueError where the logits are not a linear function of what the last layer of the head gets.
    """
    _check_linear(trainer)
    features, labels = labelled_features(trainer, trainer.train_dataset, training=True)
    held = _held_out(trainer)
    validation = None if held is None else held[0]
    model: Any = trainer.model
    weights = trainer.class_weights
    fit = partial(
        fit_probe,
        task=task_of(model.config.problem_type),
        labels=model.config.num_labels,
        class_weights=None if weights is None else weights.tolist(),
        intercept=output_layer(model).bias is not None,
    )
    parts = [slice(None)]
    several = isinstance(model, PooledClassifier) and len(model.layers) > 1 and model.pool.of_last
    if choose_layers and several and validation is not None and len(validation):
        parts.append(slice(-model.config.hidden_size, None))

    def fitted() -> tuple[int, tuple[Probe, Probe], tuple[Probe, Probe] | None]:
        probes = [fit(features[:, part], labels, held and (held[0][:, part], held[1])) for part in parts]
        chosen = min(range(len(parts)), key=lambda number: probes[number].loss or 0.0)
        part, strength = parts[chosen], probes[chosen].strength

        def with_start(x: np.ndarray, y: np.ndarray, probe: Probe) -> tuple[Probe, Probe]:
            return probe, probe if penalty == 1.0 else fit(x, y, None, strength=strength / penalty)

        first = with_start(features[:, part], labels, probes[chosen])
        if held is None or not on_all:
            return chosen, first, None
        x, y = np.concatenate([features, held[0]])[:, part], np.concatenate([labels, held[1]])
        return chosen, first, with_start(x, y, fit(x, y, None, strength=strength))

    chosen, (probe, start), together = on_first(fitted)
    if chosen:
        model.read_last_layer()
        state = injection(model)
        state.info = state.info and replace(state.info, pooling=pooling_of(model))
    logits = None if validation is None else probe.logits(validation[:, parts[chosen]])
    return WarmStart(probe, logits, start, last_layer=bool(chosen), on_all=together)


@dataclass(frozen=True)
class HeadStart:
    """How the head begins, and why; `warm` has the probe, where one could be fitted."""

    kind: str
    reason: str
    warm: WarmStart | None
    seconds: float

    def fallback(self, head_is_trained: bool) -> WarmStart | None:
        """What a run goes back to where training did worse; None for a head that was to be random, or to stay."""
        return self.warm if self.kind == "probe" or (self.kind == "checkpoint" and head_is_trained) else None

    def __str__(self) -> str:
        words = f"{'linear probe' if self.kind == 'probe' else self.kind}: {self.reason}"
        if self.warm is not None:
            words += f"; {self.warm.probe.examples:,} examples, C = {self.warm.probe.strength:g}"
            words += ", better on the last layer alone, which the head reads now" * self.warm.last_layer
        return f"{words}; {self.seconds:.1f} s"


def start_head(
    trainer: LoRATrainer,
    head_init: str = "auto",
    *,
    penalty: float = HEAD_PENALTY,
    choose_layers: bool = False,
    on_all: bool = False,
) -> HeadStart:
    """Before training: fit a probe and, unless `head_init` or the checkpoint say otherwise, start the head from it.

    head_init: "probe", "random", or "auto": the probe, but for a head that the checkpoint brings trained, and where
    the model allows none, which a warning says. penalty: the head is fitted with so many times the penalty of the
    probe; 1: it is the probe. choose_layers, on_all: as for `fit_warm_start`. A trainer that makes its model anew
    (`model_init`) starts that one's head in the same way. Raises ValueError for another name, a penalty that is not
    above 0, training data without labels, and where a probe was asked for that cannot be had.
    """
    if head_init not in HEAD_INITS:
        raise unknown("head_init", head_init, HEAD_INITS)
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"head_penalty is not usable; got {penalty!r}; expected a number above 0")
    start = time.perf_counter()
    options: dict[str, bool] = {"choose_layers": choose_layers, "on_all": on_all}
    kind, reason, warm = head_init, "as asked for", None
    keeps_own = head_init == "auto" and not _is_fresh(trainer.model)
    # A head that does not start from the regression needs the probe alone, to be compared with.
    unused = head_init == "random" or keeps_own
    if not unused:
        _check_data(trainer)
    try:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "no probe is fitted where the weights are sharded; got FSDP or DeepSpeed; use DDP"
            )
        warm = fit_warm_start(trainer, 1.0 if unused else penalty, **options)
        if head_init == "auto":
            kind = "probe"
            reason = f"{task_of(trainer.model.config.problem_type).probe} on the frozen features"
    except ValueError as error:
        if head_init == "probe":
            raise
        if head_init == "auto":
            kind, reason = "random", str(error)
    if keeps_own:
        kind, reason = "checkpoint", "the checkpoint has a trained head for these labels"
    if kind == "random" and head_init == "auto":
        logger.warning("the head starts at random: %s", reason)
    if kind == "probe" and warm is not None:
        install(trainer.model, warm.start)
    trainer.starts["head"] = partial(start_head, trainer, head_init, penalty=penalty, **options)
    return HeadStart(kind, reason, warm, time.perf_counter() - start)


def _is_fresh(model: nn.Module) -> bool:
    """Whether the head's output layer is new; one whose origin is not known counts as new."""
    fresh = injection(model).fresh
    try:
        layer = output_layer(model)
    except ValueError:
        return True
    return fresh is None or any(
        f"{name}.weight" in fresh for name, each in model.named_modules() if each is layer
    )


@torch.no_grad()
def install(model: nn.Module, probe: Probe) -> None:
    """Let the head's last layer be the probe: the logits are then the probe's."""
    layer = output_layer(model)
    layer.weight.copy_(torch.from_numpy(probe.weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.from_numpy(probe.bias))


def _held_out(trainer: LoRATrainer) -> tuple[np.ndarray, np.ndarray] | None:
    """Features and labels of the evaluation set, or of all of them in turn."""
    data: Any = trainer.eval_dataset
    if data is None:
        return None
    parts = data.values() if isinstance(data, dict) else [data]
    features, labels = zip(*(labelled_features(trainer, part) for part in parts), strict=True)
    return np.concatenate(features), np.concatenate(labels)


def _check_data(trainer: LoRATrainer) -> None:
    """Raise ValueError for a trainer without examples that have labels."""
    data: Any = trainer.train_dataset
    rows = [] if data is None else list(islice(data, 4))
    if not rows:
        raise ValueError(f"{_NEEDS}; got no training data; {_EXPECTED}")
    if "labels" not in trainer.collated(rows):
        got = ", ".join(rows[0]) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
        raise ValueError(f"{_NEEDS}; got {got}; {_EXPECTED}")


@torch.no_grad()
def _check_linear(trainer: LoRATrainer) -> None:
    model: Any = trainer.model
    layer = output_layer(model)
    batch = trainer.collated(list(islice(trainer.train_dataset, 4)))
    batch.pop("labels", None)
    with evaluating(model):
        logits = model(**batch).logits.float()
        with features_as_logits(layer):
            features = model(**batch).logits
    expected = nn.functional.linear(features.float(), layer.weight.float(), layer.bias)
    if features.ndim != 2 or expected.shape != logits.shape or relative_difference(expected, logits) > 0.01:
        raise ValueError(
            f"the logits of a {type(model).__name__} are not a linear function of its head's last layer; "
            "expected such for head_init=probe; use head_init=random"
        )
