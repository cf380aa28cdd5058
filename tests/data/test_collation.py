from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from datasets import Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_lora.data.collation import QuickPadding, quick_collator

LABELS = {
    "single_label": {"labels": [2, 0, 1]},
    "label": {"label": [2, 0, 1]},
    "label_ids": {"label_ids": [2, 0, 1]},
    "multi_label": {"labels": [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]},
    "regression": {"labels": [0.5, -1.0, 3.25]},
    "none": {},
}


def tokenizer(side: str = "right", inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Any:
    made = tiny_tokenizer()
    made.padding_side = side
    made.model_input_names = list(inputs)
    # Another pad id and type than 0, which anything left empty would have.
    made.pad_token = "[MASK]"
    made._pad_token_type_id = 3
    return made


def rows(columns: dict[str, Any], names: tuple[str, ...], size: int = 3) -> list[dict[str, Any]]:
    tokens = {
        "input_ids": [[2, 7, 8, 9, 3], [2, 3], [2, 9, 3]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0], [0, 1, 1]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1], [1, 0, 1]],
        "special_tokens_mask": [[1, 0, 0, 0, 1], [1, 1], [1, 0, 1]],
    }
    return Dataset.from_dict({**{name: tokens[name] for name in names}, **columns}).__getitems__(
        list(range(size))
    )


def assert_same_batch(made: Any, expected: Any) -> None:
    assert type(made) is type(expected)
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(
    "names",
    [
        ("input_ids", "attention_mask"),
        ("input_ids", "token_type_ids", "attention_mask"),
        ("input_ids", "token_type_ids"),
        ("attention_mask", "special_tokens_mask", "input_ids"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("size", [1, 3])
def test_the_tensors_are_those_of_data_collator_with_padding(
    size: int, names: tuple[str, ...], labels: dict[str, Any], side: str
) -> None:
    batch = rows(labels, names, size)
    tok = tokenizer(side)
    assert_same_batch(QuickPadding(tok)(batch), DataCollatorWithPadding(tok)(batch))


def test_the_padding_is_on_the_side_and_of_the_value_of_the_tokenizer() -> None:
    batch = QuickPadding(tokenizer("left"))(rows(LABELS["regression"], ("input_ids", "token_type_ids")))
    mask = tokenizer().mask_token_id
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3], [mask, mask, mask, 2, 3], [mask, mask, 2, 9, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [3, 3, 3, 0, 0], [3, 3, 0, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert torch.equal(batch["labels"], torch.tensor([0.5, -1.0, 3.25]))


def test_a_tokenizer_without_attention_mask_gets_none() -> None:
    tok = tokenizer(inputs=("input_ids",))
    batch = rows(LABELS["single_label"], ("input_ids", "token_type_ids"))
    assert_same_batch(QuickPadding(tok)(batch), DataCollatorWithPadding(tok)(batch))
    assert "attention_mask" not in QuickPadding(tok)(batch)


@pytest.mark.parametrize("format", ["torch", "numpy"])
def test_rows_of_tensors_are_padded_too(format: str) -> None:
    dataset = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 3]], "labels": [1, 0]}).with_format(format)
    batch = [dataset[0], dataset[1]]
    assert_same_batch(QuickPadding(tokenizer())(batch), DataCollatorWithPadding(tokenizer())(batch))


def test_columns_that_cannot_be_padded_are_the_same_error() -> None:
    batch = rows({"words": [[1], [1, 2], [3]]}, ("input_ids",))
    for collator in (QuickPadding(tokenizer()), DataCollatorWithPadding(tokenizer())):
        with pytest.raises(ValueError, match="words"):
            collator(batch)


class OwnPadding(PreTrainedTokenizerFast):
    def _pad(self, *args: Any, **kwargs: Any) -> Any:
        return super()._pad(*args, **kwargs)


def test_only_the_plain_collator_of_a_plain_tokenizer_is_replaced() -> None:
    plain = DataCollatorWithPadding(tokenizer())
    assert type(quick_collator(plain)) is QuickPadding and quick_collator(plain).tokenizer is plain.tokenizer
    own = OwnPadding(tokenizer_object=tokenizer()._tokenizer, pad_token="[PAD]")
    without_pad = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer)
    for kept in (
        default_data_collator,
        DataCollatorWithPadding(tokenizer(), pad_to_multiple_of=8),
        DataCollatorWithPadding(tokenizer(), padding="max_length", max_length=32),
        DataCollatorForTokenClassification(tokenizer()),
        DataCollatorWithPadding(own),
        DataCollatorWithPadding(without_pad),
        QuickPadding(tokenizer()),
    ):
        assert quick_collator(kept) is kept


def test_many_random_batches_agree() -> None:
    generator = np.random.default_rng(0)
    tok = tokenizer()
    for _ in range(50):
        lengths = generator.integers(1, 20, size=generator.integers(1, 9))
        batch = [
            {"input_ids": generator.integers(5, 40, n).tolist(), "attention_mask": [1] * n, "labels": 0}
            for n in lengths.tolist()
        ]
        assert_same_batch(QuickPadding(tok)(batch), DataCollatorWithPadding(tok)(batch))
