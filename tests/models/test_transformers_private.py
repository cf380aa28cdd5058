"""A contract with transformers and torch: each private part that we use is there and does what we use it for."""

import shutil

import huggingface_hub
import pytest
import torch
import transformers
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from hf_lora.models import _transformers_private as private
from hf_lora.models.loading import load_base


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.PreTrainedModel, "_supports_sdpa"),
        (transformers.PreTrainedModel, "_supports_flash_attn"),
        (transformers.PreTrainedModel, "_supports_flex_attn"),
        (transformers.PreTrainedModel, "_supports_attention_backend"),
        (transformers.PreTrainedModel, "_can_set_attn_implementation"),
        (transformers.PreTrainedConfig, "_attn_implementation"),
        (PreTrainedTokenizerBase, "_pad"),
        (torch, "_softmax_backward_data"),
        (nn.Module(), "_forward_pre_hooks"),
    ],
)
def test_it_has_not_moved(owner, name):
    assert hasattr(owner, name), f"{name} of {owner} has moved; see hf_lora/models/_transformers_private.py"


def test_attention_can_be_asked_for_and_replaced():
    model = tiny_model("bert")
    assert private.runs_sdpa(model) and not private.runs_sdpa(nn.Linear(2, 2))
    private.set_eager_attention(model.config)
    assert model.config._attn_implementation == "eager" and not private.runs_sdpa(model)


def test_a_model_of_the_hub_knows_its_commit(tiny_bert_dir, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_bert_dir, repository / "snapshots" / commit)
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    model, _ = load_base("someone/something", ["a", "b"], **hub)
    assert private.commit_of(model.config) == commit
    assert model.config._name_or_path == model.name_or_path == "someone/something"


def test_a_local_model_has_no_commit(tiny_bert_dir):
    model, _ = load_base(str(tiny_bert_dir), ["a", "b"])
    assert private.commit_of(model.config) is None
    assert model.config._name_or_path == model.name_or_path == str(tiny_bert_dir)
    assert "_commit_hash" not in model.config.to_dict()


def test_the_gradient_of_a_softmax_is_autograds():
    generator = torch.Generator().manual_seed(0)
    scores, grad = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    scores.requires_grad_(True)
    probabilities = scores.softmax(-1)
    [expected] = torch.autograd.grad(probabilities, scores, grad)
    torch.testing.assert_close(private.softmax_backward(grad, probabilities.detach()), expected)


def test_a_file_that_is_not_there_is_none(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("{}")
    assert private.optional_file(str(tmp_path), "a.json", revision=None) == tmp_path / "a.json"
    assert private.optional_file(str(tmp_path), "b.json", revision=None) is None
    # Of the Hub too, and without a network. Plainly asked, transformers raises.
    cache = {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert private.optional_file("someone/something", "a.json", revision=None, **cache) is None
    with pytest.raises(OSError, match="connect"):
        cached_file("someone/something", "a.json", **cache)
