"""What processes agree about; here one process, and two in tests/test_distributed.py."""

import pytest
import torch
from conftest import tiny_classifier
from torch import nn

from hf_lora import LoRAConfig, inject_lora
from hf_lora.training.distributed import (
    any_process,
    check_equal,
    first_to_fail,
    keep_frozen_local,
    mean_shares,
    on_first,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([16], [1.0]), ([8, 8, 8], [1.0, 1.0, 1.0]), ([8, 4], [4 / 3, 2 / 3]), ([], []), ([0], [1.0])],
)
def test_means_of_batches_are_weighted_by_their_examples(sizes, expected):
    assert mean_shares(sizes, CPU) == expected
    if len(set(sizes)) == 1:
        # Exactly: the loss of equal batches must not be touched.
        assert all(share == 1.0 for share in mean_shares(sizes, CPU))


def test_shares_make_the_mean_over_all_examples():
    losses, sizes = [0.5, 2.0, 1.0], [3, 1, 6]
    shares = mean_shares(sizes, CPU)
    mean = sum(loss * share for loss, share in zip(losses, shares, strict=True)) / 3
    assert mean == pytest.approx((3 * 0.5 + 1 * 2.0 + 6 * 1.0) / 10)


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_equal({"base model": "a"})
    assert any_process(True, CPU) and not any_process(False, CPU)
    assert on_first(lambda: 3) == 3 and first_to_fail()
    with pytest.raises(ValueError, match="wrong"):
        on_first(lambda: (_ for _ in ()).throw(ValueError("wrong")))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_to_fail()


def test_frozen_weights_and_buffers_are_not_sent_and_what_changes_is():
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(rank=4))
    model.norm = nn.BatchNorm1d(3)
    model.norm.requires_grad_(False)
    keep_frozen_local(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert everything - ignored == trained | statistics
