"""The blocks below the adapters of a bank run once for a text, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import tiny_batch, tiny_classifier
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from hf_lora.prefix.shared import SharedPrefix

INPUTS = {name: value for name, value in tiny_batch(size=3).items() if name != "labels"}
# Which text each row is of.
ROWS = torch.tensor([2, 0, 0, 1, 2, 2, 1])


@contextmanager
def counted(model: nn.Module, part: str) -> Iterator[Counter[str]]:
    """How many rows the modules called `part` of each block get."""
    rows: Counter[str] = Counter()

    def note(name: str) -> Any:
        return lambda _, inputs: rows.update({name: len(inputs[0])})

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if name.endswith(part)
    ]
    yield rows
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_a_forward_that_begins_behind_the_blocks_gives_what_a_whole_one_gives(depth: int) -> None:
    model: Any = tiny_classifier()
    expected = model(**INPUTS, output_hidden_states=True)
    prefix = SharedPrefix(model.base_model, lambda: model(**INPUTS), 3)
    with counted(model, "intermediate.dense") as rows:
        with prefix.recording(depth) as states:
            model(**INPUTS)
        assert rows == {f"bert.encoder.layer.{index}.intermediate.dense": 3 for index in range(depth)}
        rows.clear()
        below = range(depth - 1)
        with prefix.replaying(depth, states, ROWS, below):
            got = model(**{name: value[ROWS] for name, value in INPUTS.items()}, output_hidden_states=True)
        assert rows == {f"bert.encoder.layer.{index}.intermediate.dense": 7 for index in range(depth, 2)}
    torch.testing.assert_close(got.logits, expected.logits[ROWS], rtol=0, atol=1e-6)
    for layer in range(1, 3):
        torch.testing.assert_close(
            got.hidden_states[layer], expected.hidden_states[layer][ROWS], rtol=0, atol=1e-6
        )
    # Outside, the model is what it was.
    torch.testing.assert_close(model(**INPUTS).logits, expected.logits, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "deberta-v2", "distilbert", "gpt2", "llama"])
@torch.no_grad()
def test_any_model_with_one_list_of_blocks_can_begin_behind_the_first(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    inputs = {k: v[:3] for k, v in tiny_inputs(model_type).items() if k != "labels"}
    rows = torch.tensor([1, 0, 1, 1])
    expected = model(**inputs).logits[rows]
    prefix = SharedPrefix(model.base_model, lambda: model(**inputs), 3)
    with prefix.recording(1) as states:
        model(**inputs)
    with prefix.replaying(1, states, rows):
        got = model(**{name: value[rows] for name, value in inputs.items()}).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_depth_is_that_of_the_first_module() -> None:
    model: Any = tiny_classifier()
    prefix = SharedPrefix(model.base_model, lambda: model(**INPUTS), 3)
    for modules, depth in {
        (): 2,
        ("pooler.dense",): 2,
        ("encoder.layer.1.output.dense", "pooler.dense"): 1,
        ("encoder.layer.1.output.dense", "encoder.layer.0.attention.self.query"): 0,
        ("embeddings.LayerNorm", "encoder.layer.1.output.dense"): 0,
    }.items():
        assert prefix.depth(modules) == depth, modules


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("albert", "needs one list of blocks that run once each; got"),
        (
            "bart",
            r"needs one list of blocks that run once each; got encoder.layers, decoder.layers in BartModel",
        ),
        ("xlnet", r"needs states of 3 sequences; got \(12, 3, 32\)"),
    ],
)
def test_a_model_without_blocks_of_sequences_is_refused(model_type: str, message: str) -> None:
    model: Any = tiny_model(model_type)
    inputs = {k: v[:3] for k, v in tiny_inputs(model_type).items() if k != "labels"}
    with pytest.raises(ValueError, match=message):
        SharedPrefix(model.base_model, lambda: model(**inputs), 3)
