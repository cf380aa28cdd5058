from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_classifier, tiny_tokenizer
from fake_hub import FakeHub, folder_files
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from hf_lora import load_adapter, save_adapter
from hf_lora.adapters.extract import (
    Change,
    extract_adapter,
    extract_finetuned,
    inject_extraction,
    linear_modules,
)
from hf_lora.lora.inject import lora_layers

HEAD = ("classifier",)
NORM = "bert.encoder.layer.0.output.LayerNorm"
QUERY = "bert.encoder.layer.1.attention.self.query"


def tuned(*, only: str = "") -> nn.Module:
    """The tiny BERT after a full fine-tuning: every parameter moved, or those with `only` in their names."""
    model = tiny_classifier()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


@pytest.mark.parametrize("budget", [{"rank": 3}, {"energy": 0.6}, {"energy": 1.0}])
def test_every_change_is_the_dense_svd_cut_off(budget: dict):
    base, model = tiny_classifier(), tuned()
    modules = linear_modules(base)
    assert len(modules) == 2 * 6 + 1 and "classifier" not in modules
    result = extract_adapter(tensors(base), tensors(model), modules=modules, head=HEAD, **budget)
    for module in modules:
        weight = f"{module}.weight"
        change = (tensors(model)[weight] - tensors(base)[weight]).detach().double()
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        shares = S.square().cumsum(0) / S.square().sum()
        rank = budget.get("rank") or int((shares < budget["energy"] - 1e-14).sum()) + 1
        entry, report = result.adapter.factors[module], result.truncations[module]
        assert (report.old_rank, report.new_rank, entry.scaling) == (32, rank, 1.0)
        assert report.kept_energy == pytest.approx(shares[rank - 1].item(), abs=1e-5)
        expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert_close((entry.B @ entry.A).double(), expected, rtol=1e-4, atol=1e-5)
        size = tensors(base)[weight].norm().item()
        assert result.covered[module] == Change(
            pytest.approx(change.norm().item()), pytest.approx(size, rel=1e-5)
        )


def test_what_moved_is_covered_carried_or_left_out():
    base, model = tensors(tiny_classifier()), tensors(tuned())
    modules = linear_modules(tiny_classifier(), projections="qv")
    result = extract_adapter(base, model, modules=modules, rank=1, head=HEAD)
    assert set(result.covered) == set(modules) and len(modules) == 4
    outside = {name for name in base if not name.startswith("classifier")}
    weights = {f"{module}.weight" for module in modules}
    assert set(result.carried) == {name for name in outside if base[name].ndim == 1}
    assert set(result.left_out) == {name for name in outside if base[name].ndim == 2} - weights
    assert "bert.embeddings.word_embeddings.weight" in result.left_out
    assert "bert.encoder.layer.0.intermediate.dense.weight" in result.left_out
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    moved, size = (model[name] - base[name]).norm().item(), base[name].norm().item()
    assert result.left_out[name].relative == pytest.approx(moved / size, rel=1e-5)
    bias = "bert.encoder.layer.0.intermediate.dense.bias"
    assert base[bias].norm() == 0 and result.carried[bias].relative == 1.0


def test_what_did_not_move_is_not_reported_and_takes_rank_1():
    base, model = tensors(tiny_classifier()), tensors(tuned(only=QUERY + ".weight"))
    modules = linear_modules(tiny_classifier())
    result = extract_adapter(base, model, modules=modules, energy=1.0, head=HEAD)
    ranks = {module: report.new_rank for module, report in result.truncations.items()}
    assert ranks == {module: 32 if module == QUERY else 1 for module in modules}
    assert not result.carried and not result.left_out
    assert (result.bias, result.modules_to_save) == ("none", HEAD)
    assert set(result.adapter.whole) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("only", "bias", "norms"), [("LayerNorm", "none", 5), ("dense.bias", "all", 0), ("", "all", 5)]
)
def test_changed_vectors_are_carried_where_peft_has_a_place(only: str, bias: str, norms: int):
    base, model = tensors(tiny_classifier()), tensors(tuned(only=only))
    modules = linear_modules(tiny_classifier())
    result = extract_adapter(base, model, modules=modules, energy=1.0, head=HEAD)
    assert result.bias == bias and len(result.modules_to_save) == 1 + norms
    assert (NORM in result.modules_to_save) == bool(norms)
    for name in result.carried:
        assert torch.equal(result.adapter.whole[name], model[name])
    dropped = extract_adapter(base, model, modules=modules, energy=1.0, head=HEAD, keep_vectors=False)
    assert not dropped.carried and set(result.carried) <= set(dropped.left_out)


@pytest.mark.parametrize("projections", [None, "qkvo"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_the_directory_gives_the_tuned_logits_here_and_in_peft(
    tmp_path: Path, model_type: str, projections: str | None
):
    base = tiny_classifier(model_type)
    modules = linear_modules(base, projections=projections)
    model = tiny_classifier(model_type)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.rpartition(".")[0] in modules or "classifier" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    head = tuple(name for name in ("classifier", "pre_classifier") if hasattr(base, name))
    result = extract_adapter(tensors(base), tensors(model), modules=modules, energy=1.0, head=head)
    assert not result.left_out
    inject_extraction(base, result)
    assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-4)
    save_adapter(base, tmp_path / "adapter")
    again = tiny_classifier(model_type)
    load_adapter(again, tmp_path / "adapter")
    assert set(lora_layers(again)) == set(modules)
    assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    peft = PeftModel.from_pretrained(tiny_classifier(model_type), tmp_path / "adapter").eval()
    assert_close(logits(peft), logits(model), rtol=1e-4, atol=1e-4)


def test_a_small_rank_of_a_large_matrix_is_nearly_the_best_and_always_the_same():
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(400, 300, generator=generator) * torch.linspace(1, 0.05, 300)
    base, model = {"m.weight": torch.zeros(400, 300)}, {"m.weight": change}
    state = torch.random.get_rng_state()
    first, second = (extract_adapter(base, model, modules=["m"], rank=8) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    entry = first.adapter.factors["m"]
    assert torch.equal(entry.A, second.adapter.factors["m"].A)
    values = torch.linalg.svdvals(change.double())
    best = (values[8:].norm() / values.norm()).item()
    report = first.truncations["m"]
    assert (report.old_rank, report.new_rank) == (300, 8)
    assert best <= report.relative_error <= 1.001 * best
    measured = (change - entry.B @ entry.A).norm() / change.norm()
    assert report.relative_error == pytest.approx(measured.item(), rel=1e-4)


def test_models_and_modules_that_do_not_fit_are_refused():
    base = tensors(tiny_classifier())
    modules = [QUERY]
    cases = {
        "not one of this base; 'bert.embeddings.word_embeddings.weight' has shape": (
            tensors(tiny_classifier(vocab_size=70)),
            modules,
        ),
        "has shape none": ({name: t for name, t in base.items() if NORM not in name}, modules),
        "cannot be extracted; got \\['nothing'\\]": (base, [QUERY, "nothing"]),
        "cannot be extracted; got \\['classifier'\\]": (base, ["classifier"]),
        f"cannot be extracted; got \\['{NORM}'\\]": (base, [NORM]),
        "got none": (base, []),
    }
    for message, (other, wanted) in cases.items():
        with pytest.raises(ValueError, match=message):
            extract_adapter(base, other, modules=wanted, rank=1, head=HEAD)
    with pytest.raises(ValueError, match="either a rank or an energy"):
        extract_adapter(base, base, modules=modules, head=HEAD)


def test_a_head_of_another_size_is_taken_whole():
    base, model = tensors(tiny_classifier()), tensors(tiny_classifier(num_labels=5))
    result = extract_adapter(base, model, modules=[QUERY], rank=1, head=HEAD)
    assert result.adapter.whole["classifier.weight"].shape == (5, 32)


def test_half_precision_models_are_compared_in_full_precision():
    base = tensors(tiny_classifier().bfloat16())
    model = {name: tensor + 2**-9 * tensor.abs().max() for name, tensor in base.items()}
    result = extract_adapter(base, model, modules=[QUERY], energy=1.0, head=HEAD)
    change = model[QUERY + ".weight"].float() - base[QUERY + ".weight"].float()
    entry = result.adapter.factors[QUERY]
    assert entry.A.dtype == torch.float32
    assert_close(entry.B @ entry.A, change.detach(), rtol=1e-4, atol=1e-6)


def test_a_projection_that_is_no_linear_layer_is_refused():
    model = tiny_classifier("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(ValueError, match=r"cannot be extracted; got 'transformer.h.0.attn.c_attn'"):
        linear_modules(model, projections="qv")


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_checkpoint_of_the_hub_brings_its_tokenizer_or_has_its_bases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert_dir: Path, has_tokenizer: bool
):
    tuned().save_pretrained(tmp_path / "tuned")
    if has_tokenizer:
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 17
        tokenizer.save_pretrained(tmp_path / "tuned")
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path, token="")
        repository = hub.publish("org/tuned", folder_files(tmp_path / "tuned"))
        hub.publish("org/tuned", {"config.json": b"{}"}).commits.update(repository.commits)
        commit = repository.refs["main"]
        found = extract_finetuned(str(tiny_bert_dir), "org/tuned", finetuned_revision=commit, energy=1.0)
    assert found.tokenizer.model_max_length == (17 if has_tokenizer else 64)
    for name, tensor in tuned().named_parameters():
        assert torch.equal(found.checkpoint.get_parameter(name), tensor)
