from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_classifier
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from hf_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from hf_lora.adapters.arithmetic import Truncation, check_combinable, combine, resize
from hf_lora.adapters.directory import CONFIG, read_adapter
from hf_lora.adapters.info import BaseModel
from hf_lora.adapters.values import Adapter, Factors, write_adapter
from hf_lora.lora.inject import lora_layers


def delta(factors: Factors) -> Tensor:
    """ΔW `(out, in)` in double precision, dense."""
    A, B = factors.matrices
    return factors.scaling * B @ A


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {module: delta(factors) for module, factors in adapter.factors.items()}


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by the dense SVD."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def random_adapter(seed: int, ranks: dict[str, int], scaling: float = 0.7) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            torch.randn(rank, 9, generator=generator), torch.randn(11, rank, generator=generator), scaling
        )
        for name, rank in ranks.items()
    }
    return Adapter(factors, {"classifier.weight": torch.randn(3, 9, generator=generator)})


def of_singular_values(*values: float) -> Adapter:
    """A diagonal update."""
    size = len(values)
    return Adapter({"m": Factors(torch.eye(size), torch.diag(torch.tensor(values)), 1.0)})


def saved(directory: Path, *, seed: int = 0, config: LoRAConfig | None = None, **overrides: Any) -> Path:
    """An adapter directory of the tiny BERT with random factors, head and trained biases."""
    model = tiny_classifier(**overrides)
    inject_lora(model, config or LoRAConfig(rank=4, alpha=6))
    randomize(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return save_adapter(model, directory)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def loaded(directory: Path) -> Tensor:
    model = tiny_classifier()
    load_adapter(model, directory)
    return logits(model)


def with_peft(directory: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(tiny_classifier(), directory).eval())


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_resize_is_the_dense_svd_cut_off(rank: int):
    adapter = random_adapter(0, {"a": 5, "b": 3, "c": 14}, scaling=-0.7)
    smaller, report = resize(adapter, rank=rank)
    for module, old in adapter.factors.items():
        new, dense = smaller.factors[module], delta(old)
        kept = min(rank, old.rank, 9)
        assert new.A.shape == (kept, 9) and new.B.shape == (11, kept) and new.A.dtype == torch.float32
        assert_close(delta(new), best(dense, kept), rtol=1e-5, atol=1e-5)
        values = torch.linalg.svdvals(dense)
        lost = values[kept:].norm() / values.norm()
        assert report[module] == Truncation(
            old.rank, kept, pytest.approx(1 - lost.item() ** 2), pytest.approx(lost.item(), abs=1e-7)
        )
        # Balanced: both factors have the roots of the singular values as their row and column norms.
        assert_close(new.A.double().norm(dim=1), values[:kept].sqrt(), rtol=1e-5, atol=1e-6)
        assert_close(new.B.double().norm(dim=0), values[:kept].sqrt(), rtol=1e-5, atol=1e-6)
    assert smaller.whole == adapter.whole


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(1e-6, 1), (16 / 30, 1), (16 / 30 + 1e-9, 2), (25 / 30, 2), (25 / 30 + 1e-9, 3), (29 / 30, 3), (1.0, 4)],
)
def test_energy_keeps_the_smallest_rank_that_is_enough(energy: float, rank: int):
    _, report = resize(of_singular_values(3.0, 1.0, 4.0, 2.0), energy=energy)
    kept = sum([16, 9, 4, 1][:rank]) / 30
    assert report["m"] == Truncation(4, rank, pytest.approx(kept), pytest.approx(math.sqrt(1 - kept)))


def test_energy_1_drops_only_what_is_zero():
    adapter = random_adapter(1, {"a": 2})
    smaller, report = resize(combine([adapter, adapter], [1.0, 0.5]), energy=1.0)
    assert (report["a"].old_rank, report["a"].new_rank) == (4, 2)
    assert_close(delta(smaller.factors["a"]), 1.5 * delta(adapter.factors["a"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [{"rank": 3}, {"energy": 0.9}])
def test_an_update_of_zero_keeps_rank_1_of_zeros(budget: dict[str, Any]):
    adapter = random_adapter(2, {"a": 4})
    nothing = Adapter({"z": Factors(torch.randn(4, 9), torch.zeros(11, 4), 2.0)})
    bare = replace(adapter, whole={})
    for zero, module in ((nothing, "z"), (combine([bare, bare], [0.3, -0.3]), "a")):
        smaller, report = resize(zero, **budget)
        entry = smaller.factors[module]
        assert report[module].new_rank == 1 and report[module].relative_error == 0.0
        assert torch.equal(entry.A, torch.zeros(1, 9)) and torch.equal(entry.B, torch.zeros(11, 1))


@pytest.mark.parametrize(
    "budget", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}]
)
def test_an_unusable_budget_is_refused(budget: dict[str, Any]):
    with pytest.raises(ValueError, match=r"rank|energy"):
        resize(random_adapter(0, {"a": 2}), **budget)


def test_combine_is_the_weighted_sum_and_ranks_add_up():
    first, second = random_adapter(3, {"a": 2, "b": 3}, 0.5), random_adapter(4, {"b": 4, "c": 1}, 2.0)
    both = combine([first, second], [2.0, -0.5])
    assert {name: factors.rank for name, factors in both.factors.items()} == {"a": 2, "b": 7, "c": 1}
    expected = {
        "a": 2.0 * delta(first.factors["a"]),
        "b": 2.0 * delta(first.factors["b"]) - 0.5 * delta(second.factors["b"]),
        "c": -0.5 * delta(second.factors["c"]),
    }
    assert_close(deltas(both), expected, rtol=1e-5, atol=1e-5)
    heads = [adapter.whole["classifier.weight"] for adapter in (first, second)]
    assert_close(both.whole["classifier.weight"], (2.0 * heads[0] - 0.5 * heads[1]) / 1.5)


def test_average_divides_the_weights_by_their_sum():
    adapters = [random_adapter(seed, {"a": 2}) for seed in (5, 6)]
    average, total = combine(adapters, [1.0, 3.0], average=True), combine(adapters, [1.0, 3.0])
    assert_close(
        delta(average.factors["a"]), 0.25 * deltas(adapters[0])["a"] + 0.75 * deltas(adapters[1])["a"]
    )
    assert_close(delta(total.factors["a"]), 4 * delta(average.factors["a"]))
    assert_close(average.whole, total.whole)


def test_combine_refuses_what_does_not_fit():
    adapter = random_adapter(7, {"a": 2})
    wide = Adapter({"a": Factors(torch.ones(2, 10), torch.ones(11, 2), 1.0)}, adapter.whole)
    other_head = replace(adapter, whole={"classifier.weight": torch.ones(4, 9)})
    cases = {
        "one weight for each": ([adapter], [1.0, 2.0]),
        "finite": ([adapter], [math.nan]),
        "'a' have different sizes": ([adapter, wide], [1.0, 1.0]),
        "'classifier.weight' has shape \\(4, 9\\) in 'adapter 2'": ([adapter, other_head], [1.0, 1.0]),
        "sum to 0": ([adapter, adapter], [1.0, -1.0]),
    }
    for message, (adapters, weights) in cases.items():
        with pytest.raises(ValueError, match=message):
            combine(adapters, weights)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_combine_agrees_with_pefts_cat_and_its_merged_weights(tmp_path: Path, use_rslora: bool):
    options = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "rank_pattern": {"1.*query": 2}},
        {"r": 3, "lora_alpha": 16, "target_modules": ["query", "value"]},
    ]
    peft = get_peft_model(tiny_classifier(), LoraConfig(use_rslora=use_rslora, **options[0]))
    peft.add_adapter("second", LoraConfig(use_rslora=use_rslora, **options[1]))
    generator = torch.Generator().manual_seed(8)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(tmp_path)
    sources = [read_adapter(path) for path in (tmp_path, tmp_path / "second")]
    check_combinable(sources)
    both = combine([Adapter.from_files(files) for files in sources], [0.7, -1.5])

    layers = {module: peft.base_model.model.get_submodule(module) for module in both.factors}
    assert len(layers) == 4
    for module, layer in layers.items():
        update = 0.7 * layer.get_delta_weight("default") - 1.5 * layer.get_delta_weight("second")
        assert_close(delta(both.factors[module]).float(), update, rtol=1e-5, atol=1e-5)
    if not use_rslora:  # peft 0.21 gives the sum of rsLoRA adapters a scaling of sqrt(rank) in place of 1
        peft.add_weighted_adapter(["default", "second"], [0.7, -1.5], "both", combination_type="cat")
        peft.set_adapter("both")
        merged = dict(peft.merge_and_unload().named_parameters())
        plain = dict(tiny_classifier().named_parameters())
        for module, update in deltas(both).items():
            weight = f"{module}.weight"
            assert_close(plain[weight].double() + update, merged[weight].double(), rtol=1e-5, atol=1e-5)

    directory = write_adapter(tmp_path / "both", both, sources)
    model = tiny_classifier()
    load_adapter(model, directory)
    for module, layer in lora_layers(model).items():
        assert_close(layer.delta_weight(), delta(both.factors[module]).float(), rtol=1e-5, atol=1e-5)
    assert_close(with_peft(directory), logits(model), rtol=1e-4, atol=1e-5)


CONFIGS = {
    "plain": LoRAConfig(rank=4, alpha=6),
    "patterns": LoRAConfig(
        rank=5, alpha=3, rank_pattern={"0.*query": 2, "key": 3}, alpha_pattern={"value": 7}, projections="qkv"
    ),
    "rslora": LoRAConfig(rank=5, alpha=3, scaling="rslora", rank_pattern={"query": 3}),
    "biases": LoRAConfig(rank=2, projections="qv", bias="all"),
    "own biases": LoRAConfig(rank=2, projections="qv", bias="lora_only"),
    "regex": LoRAConfig(rank=2, target_modules=r".*\.0\..*(query|dense)"),
    "embedding": LoRAConfig(rank=3, target_modules=("word_embeddings", "query")),
    "start": LoRAConfig(rank=3, init="pissa"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_keeps_every_update_and_output(tmp_path: Path, config: LoRAConfig):
    directory = saved(tmp_path / "old", config=config)
    files = read_adapter(directory)
    adapter = Adapter.from_files(files)
    again = read_adapter(write_adapter(tmp_path / "new", adapter, [files]))
    if config.scaling == "standard":
        assert {n: f.scaling for n, f in Adapter.from_files(again).factors.items()} == {
            n: f.scaling for n, f in adapter.factors.items()
        }
    assert set(again.tensors) == set(files.tensors)
    assert all(torch.equal(again.tensors[key], files.tensors[key]) for key in files.tensors)
    assert_close(deltas(Adapter.from_files(again)), deltas(adapter), rtol=1e-12, atol=0)
    assert_close(loaded(tmp_path / "new"), loaded(directory), rtol=1e-6, atol=1e-6)
    assert_close(with_peft(tmp_path / "new"), loaded(directory), rtol=1e-4, atol=1e-5)
    assert again.info is not None and files.info is not None
    assert again.info.labels == files.info.labels and again.info.base_model == files.info.base_model
    assert set(again.info.sha256) == {CONFIG, "adapter_model.safetensors"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_full_energy_and_sums_give_the_same_outputs(tmp_path: Path, config: LoRAConfig):
    directory = saved(tmp_path / "old", config=config)
    files = read_adapter(directory)
    adapter = Adapter.from_files(files)
    halves = combine([adapter, adapter], [0.25, 0.75])
    for name, value in (("resized", resize(adapter, energy=1.0)[0]), ("halves", halves)):
        write_adapter(tmp_path / name, value, [files, files])
        assert_close(loaded(tmp_path / name), loaded(directory), rtol=1e-4, atol=1e-5)
        assert_close(with_peft(tmp_path / name), loaded(directory), rtol=1e-4, atol=1e-5)


def test_ranks_by_module_go_into_anchored_patterns(tmp_path: Path):
    directory = saved(tmp_path / "old")
    files = read_adapter(directory)
    adapter, report = resize(Adapter.from_files(files), energy=0.7)
    assert len({entry.new_rank for entry in report.values()}) > 1
    written = read_adapter(write_adapter(tmp_path / "new", adapter, [files]))
    config = written.peft_config
    assert config["target_modules"] == files.peft_config["target_modules"]
    assert all(pattern.startswith("^bert") for pattern in config["rank_pattern"])
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    again = Adapter.from_files(written)
    assert {n: f.rank for n, f in again.factors.items()} == {n: e.new_rank for n, e in report.items()}
    assert {f.scaling for f in again.factors.values()} == {1.0}
    assert_close(with_peft(tmp_path / "new"), loaded(tmp_path / "new"), rtol=1e-4, atol=1e-5)


def test_modules_that_only_one_has_are_named_in_full(tmp_path: Path):
    paths = [
        saved(tmp_path / roles, seed=seed, config=LoRAConfig(rank=2, projections=roles))
        for seed, roles in enumerate(("qv", "ko"))
    ]
    sources = [read_adapter(path) for path in paths]
    check_combinable(sources)
    both = combine([Adapter.from_files(files) for files in sources], [1.0, 1.0])
    new = read_adapter(write_adapter(tmp_path / "both", both, sources))
    assert new.peft_config["target_modules"] == sorted(both.factors) and len(both.factors) == 8
    assert new.info is not None and new.info.projections is None
    assert_close(with_peft(tmp_path / "both"), loaded(tmp_path / "both"), rtol=1e-4, atol=1e-5)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.conv = nn.Conv2d(3, 10, 3)
        self.embedding = nn.Embedding(20, 6)


def test_convolutions_and_embeddings_are_cut_as_matrices(tmp_path: Path):
    model = Pictures()
    config = LoRAConfig(rank=4, target_modules=("conv", "embedding"), form="parametrization")
    inject_lora(model, config)
    randomize(model)
    before = {name: layer.delta_weight().detach() for name, layer in lora_layers(model).items()}
    files = read_adapter(save_adapter(model, tmp_path / "old"))
    smaller, _ = resize(Adapter.from_files(files), rank=2)
    assert smaller.factors["conv"].A.shape == (2, 3, 3, 3)
    assert smaller.factors["conv"].B.shape == (10, 2, 1, 1)
    assert smaller.factors["embedding"].A.shape == (2, 20)
    write_adapter(tmp_path / "new", smaller, [files])
    again = Pictures()
    load_adapter(again, tmp_path / "new")
    after = {name: layer.delta_weight() for name, layer in lora_layers(again).items()}
    expected = {
        "conv": best(before["conv"].flatten(1).double(), 2).reshape(10, 3, 3, 3).float(),
        "embedding": best(before["embedding"].double(), 2).float(),
    }
    assert_close(after, expected, rtol=1e-4, atol=1e-6)


def test_dora_is_refused_by_name(tmp_path: Path):
    directory = saved(tmp_path / "dora", config=LoRAConfig(rank=2, variant="dora"))
    with pytest.raises(ValueError, match=r"DoRA .*lora_magnitude_vector.*merge it"):
        Adapter.from_files(read_adapter(directory))


def test_labels_task_base_and_head_must_agree(tmp_path: Path):
    first = read_adapter(saved(tmp_path / "first"))
    assert first.info is not None
    info = first.info
    base = replace(info.base_model, name_or_path="other/base", fingerprint="sha256:0")
    others = {
        "labels .*'LABEL_9'.*'other'.*'LABEL_0'.*first": replace(info, labels=("LABEL_9", "b", "c")),
        "problem type .*multi_label": replace(info, problem_type="multi_label_classification"),
        "base models .*'other/base' .*sha256:0.*first": replace(info, base_model=base),
    }
    for message, changed in others.items():
        with pytest.raises(ValueError, match=message):
            check_combinable([first, replace(first, directory=Path("other"), info=changed)])
    head = read_adapter(saved(tmp_path / "head", num_labels=4))
    with pytest.raises(ValueError, match=r"'classifier.bias' has shape \(4,\) in .*head"):
        check_combinable([replace(first, info=None), replace(head, info=None)])
    # Without a digest names are compared; without either there is nothing to compare.
    named = replace(info, base_model=BaseModel("other/base"))
    with pytest.raises(ValueError, match="other/base"):
        renamed = replace(info, base_model=BaseModel("this/base"))
        check_combinable([replace(first, info=renamed), replace(first, info=named)])
    check_combinable([first, replace(first, info=None, peft_config={**first.peft_config})])


def test_metrics_are_dropped_and_foreign_adapters_stay_without_a_sidecar(tmp_path: Path):
    files = read_adapter(saved(tmp_path / "old"))
    assert files.info is not None
    measured = replace(files, info=replace(files.info, metrics={"accuracy": 1.0}, max_length=12))
    adapter = Adapter.from_files(files)
    kept = read_adapter(write_adapter(tmp_path / "kept", adapter, [measured])).info
    assert kept is not None and not kept.metrics and kept.max_length == 12
    directory = write_adapter(tmp_path / "foreign", adapter, [replace(files, info=None)])
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG, "adapter_model.safetensors"]
    assert json.loads((directory / CONFIG).read_text())["r"] == 4
    assert_close(loaded(directory), loaded(tmp_path / "old"), rtol=1e-6, atol=1e-6)
