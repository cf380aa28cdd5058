from __future__ import annotations

import ast
import importlib.metadata
import io
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
from huggingface_hub import ModelCard

from hf_lora.adapters.card import CURVE, RunSummary, render_card, training_curve
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import ParameterCount

INFO = AdapterInfo(
    labels=("sport", "trade", "weather"),
    max_length=77,
    projections="qv",
    base_model=BaseModel("org/base-encoder", "rev-x", "sha256:ff"),
    hf_lora_version="1.2.3",
    transformers_version="5.4.3",
)
CONFIG = LoRAConfig(rank=6, alpha=13.5, dropout=0.15, projections="qv", init="gradient")
COUNT = ParameterCount(trainable=12_345, total=987_654, lora=12_000, head=345)
METRICS = {
    "eval_loss": 0.41239,
    "eval_accuracy": 0.91234567,
    "eval_f1_macro": 0.89876543,
    "eval_runtime": 3.21,
    "eval_samples_per_second": 55.5,
    "test_accuracy": 0.87654321,
    "test_f1_macro": 0.85432109,
    "train_runtime": 61.7,
    "global_step": 4242,
}
RUN = RunSummary(
    model_name="news-lora",
    dataset_name="org/news",
    license="apache-2.0",
    language="de",
    metrics=METRICS,
    label_counts={"train": {"sport": 501, "trade": 402, "weather": 303}, "test": {"sport": 51, "trade": 42}},
    class_errors={
        "sport": {"support": 51, "wrong": 4, "false_positives": 7, "wrong_disabled": 19},
        "trade": {"support": 42, "wrong": 7, "false_positives": 4, "wrong_disabled": 3},
        "weather": {"support": 0, "wrong": 0, "false_positives": 0, "wrong_disabled": 0},
    },
)
ARGS = SimpleNamespace(
    learning_rate=0.0021,
    num_train_epochs=14.0,
    per_device_train_batch_size=18,
    gradient_accumulation_steps=1,
    warmup_steps=0.06,
    weight_decay=0.01,
    seed=1234,
    lr_scheduler_type=SimpleNamespace(value="cosine"),
    head_learning_rate=None,
    bf16=False,
)
HISTORY = [
    {"loss": 1.09876, "epoch": 0.5, "step": 36},
    {"eval_loss": 0.62345, "eval_accuracy": 0.71234, "epoch": 1.0, "step": 73},
    {"loss": 0.51239, "epoch": 1.5, "step": 109},
    {"eval_loss": 0.41239, "eval_accuracy": 0.91234567, "epoch": 2.0, "step": 146},
    {"train_runtime": 61.7, "train_loss": 0.8, "epoch": 2.0, "step": 146},
]


def render(info: AdapterInfo = INFO, run: RunSummary = RUN, **options: Any) -> str:
    return render_card(info, CONFIG, COUNT, run=run, **options)


def body(card: str) -> str:
    return re.sub(r"^---\n.*?\n---\n", "", card, flags=re.DOTALL)


def tables(card: str) -> list[list[list[str]]]:
    """The cells of every table, header and rule included; `\\|` is a character and no border."""
    found: list[list[list[str]]] = [[]]
    for line in re.sub(r"```.*?```", "", body(card), flags=re.DOTALL).splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.fixture(scope="module")
def card() -> str:
    return render(args=ARGS, log_history=HISTORY)


def test_metadata_is_what_the_hub_reads(card: str) -> None:
    data = ModelCard(card).data
    assert data.base_model == "org/base-encoder"
    assert data.base_model_relation == "adapter"
    assert data.datasets == "org/news"
    assert (data.license, data.language) == ("apache-2.0", "de")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
    assert data.tags == ["lora", "transformers", "hf_lora", "peft", "base_model:adapter:org/base-encoder"]
    assert data.metrics == ["accuracy", "f1"]


def test_model_index_holds_the_measured_values(card: str) -> None:
    data = ModelCard(card).data
    assert data.model_name == "news-lora"
    found = {
        (r.dataset_split, r.metric_type, r.metric_name): (r.metric_value, r.dataset_type, r.task_type)
        for r in data.eval_results
    }
    assert {key: value[0] for key, value in found.items()} == {
        ("validation", "accuracy", "accuracy"): round(METRICS["eval_accuracy"], 6),
        ("validation", "f1", "f1_macro"): round(METRICS["eval_f1_macro"], 6),
        ("test", "accuracy", "accuracy"): round(METRICS["test_accuracy"], 6),
        ("test", "f1", "f1_macro"): round(METRICS["test_f1_macro"], 6),
    }
    assert {value[1:] for value in found.values()} == {("org/news", "text-classification")}


def test_tables_show_the_facts(card: str) -> None:
    by_header = {tuple(table[0]): table[2:] for table in tables(card)}
    assert by_header[("metric", "validation", "test")] == [
        ["loss", "0.4124", ""],
        ["accuracy", "0.9123", "0.8765"],
        ["f1_macro", "0.8988", "0.8543"],
    ]
    assert by_header[
        ("label", "examples", "wrong", "encoder without adapter", "precision", "recall", "F1")
    ] == [
        ["sport", "51", "4", "19", "0.8704", "0.9216", "0.8952"],  # 47/54, 47/51, 94/105
        ["trade", "42", "7", "3", "0.8974", "0.8333", "0.8642"],  # 35/39, 35/42, 70/81
        ["weather", "0", "0", "0", "", "", "0.0000"],
    ]
    assert "More errors with the adapter than without it: trade." in card
    assert by_header[("setting", "value")] == [
        ["adapted projections", "qv"],
        ["head", "of the architecture"],
        ["rank", "6"],
        ["alpha", "13.5"],
        ["dropout", "0.15"],
        ["LoRA parameters", "12,000"],
        ["head parameters", "345"],
    ]
    assert by_header[("hyperparameter", "value")] == [
        ["learning_rate", "0.0021"],
        ["num_train_epochs", "14.0"],
        ["per_device_train_batch_size", "18"],
        ["gradient_accumulation_steps", "1"],
        ["lr_scheduler_type", "cosine"],
        ["warmup_steps", "0.06"],
        ["weight_decay", "0.01"],
        ["seed", "1234"],
        ["lora_init", "gradient"],
    ]
    assert by_header[("epoch", "step", "training loss", "validation loss", "validation accuracy")] == [
        ["1.00", "73", "1.0988", "0.6234", "0.7123"],
        ["2.00", "146", "0.5124", "0.4124", "0.9123"],
    ]
    assert by_header[("label", "train", "test")] == [
        ["sport", "501", "51"],
        ["trade", "402", "42"],
        ["weather", "303", "0"],
    ]


def test_every_number_in_the_text_is_a_fact(card: str) -> None:
    prose = re.sub(r"```.*?```|^\|.*?$|`[^`]*`", "", body(card), flags=re.DOTALL | re.MULTILINE)
    share = f"{100 * (12_000 + 345) / 987_654:.2f}"
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    known = {"12,345", share, "987,654", "77", "1.2.3", "5.4.3", torch_version}
    assert set(re.findall(r"\d[\d.,]*\d|\d", prose)) == known
    assert "`org/base-encoder` at `rev-x`" in card


def plain(info: AdapterInfo, **run: Any) -> tuple[AdapterInfo, RunSummary]:
    return info, RunSummary(**run)


CASES = {
    "nothing measured": plain(AdapterInfo(labels=("a", "b"))),
    "regression": plain(
        AdapterInfo(labels=("stars",), problem_type="regression", base_model=BaseModel("org/base")),
        metrics={"eval_pearson": 0.51, "eval_mse": 1.25, "test_spearman": 0.25},
        label_counts={"train": {}},
    ),
    "multi-label": plain(
        AdapterInfo(labels=("x", "y", "z"), problem_type="multi_label_classification"),
        metrics={"eval_f1_micro": 0.75},
        label_counts={"train": {"x": 1, "y": 2, "z": 3}},
    ),
    "full": (INFO, RUN),
}


@pytest.mark.parametrize("case", CASES)
def test_every_task_renders_whole_tables_and_valid_code(case: str) -> None:
    info, run = CASES[case]
    card = render(info, run, args=ARGS, log_history=HISTORY)
    for table in tables(card):
        assert {len(row) for row in table} == {len(table[0])}, table
        assert set("".join(table[1])) == {"-"}
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(code) == 3
    calls = [call for block in code for call in ast.walk(ast.parse(block)) if isinstance(call, ast.keyword)]
    counts = [ast.literal_eval(call.value) for call in calls if call.arg == "num_labels"]
    assert counts == [len(info.labels)] * 2
    assert "None" not in re.sub(r"with hf_lora None, transformers None.*", "", body(card))
    assert f"| labels | {', '.join(info.labels)} |" in card


def test_card_without_metrics_claims_none() -> None:
    info, run = CASES["nothing measured"]
    card = render(info, run)
    assert "No results were measured." in card
    data = ModelCard(card).data.to_dict()
    assert "model-index" not in data and "metrics" not in data and "base_model" not in data
    assert data["tags"] == ["lora", "transformers", "hf_lora", "peft"]
    assert not {"hyperparameter", "metric", "epoch"} & {table[0][0] for table in tables(card)}


def test_baselines_are_explained_once_in_the_words_of_the_task() -> None:
    measured = {f"test_loss{end}": 0.5 for end in ("", "_probe", "_majority")}
    for kind, own, other in (
        ("single_label_classification", "majority class", "mean predictor"),
        ("regression", "mean predictor", "majority class"),
    ):
        text = render(AdapterInfo(labels=("a",), problem_type=kind), RunSummary(metrics=measured))
        assert f"| metric | validation | test | linear probe | {own} |" in text
        assert text.count("The linear probe is the same head") == 1 and f"The {own} gives every text" in text
        assert other not in text and "measured on the test split." in text


def test_a_retrained_adapter_says_when_it_was_validated() -> None:
    text = render(run=replace(RUN, metrics={**METRICS, "refit_examples": 1234}))
    assert "Validation scores were measured before retraining." in text
    assert "The final adapter was retrained on all 1,234 examples." in text


def test_regression_card_indexes_its_own_metrics() -> None:
    info, run = CASES["regression"]
    card = render(info, run)
    results = {(r.metric_type, r.metric_value) for r in ModelCard(card).data.eval_results}
    assert results == {("pearsonr", 0.51), ("mse", 1.25)}
    assert (
        "text regression model" in card and "classifier. It was" not in card and "probabilities" not in card
    )
    by_header = {tuple(table[0]): table[2:] for table in tables(card)}
    assert by_header[("metric", "validation", "test")] == [
        ["pearson", "0.5100", ""],
        ["mse", "1.2500", ""],
        ["spearman", "", "0.2500"],
    ]


def test_the_curve_the_time_and_the_place_are_shown_where_they_are_known() -> None:
    run = RunSummary(seconds=61.7, device="2 threads of a CPU", place="me/news")
    card = render(run=run, args=ARGS, curve=CURVE)
    assert "![Training curve](training_curve.png)" in card
    assert "62 seconds on 2 threads of a CPU." in card
    assert card.count('"me/news"') == 3 and "<this repository" not in card
    plain = render(run=RunSummary(), args=ARGS)
    assert "](training_curve" not in plain and " seconds" not in plain
    assert plain.count('"<this repository or directory>"') == 3


@pytest.mark.parametrize("base", [".", "/models/bert", "a/b/c", None])
def test_a_base_that_is_no_hub_id_stays_out_of_the_metadata(base: str | None) -> None:
    info = AdapterInfo(labels=("a", "b"), base_model=BaseModel(base))
    data = ModelCard(render(info, RunSummary())).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert not [tag for tag in data["tags"] if tag.startswith("base_model")]


def test_seed_zero_is_shown() -> None:
    card = render(args=SimpleNamespace(seed=0))
    by_header = {tuple(table[0]): table[2:] for table in tables(card)}
    assert by_header.get(("hyperparameter", "value")) == [["seed", "0"], ["lora_init", "gradient"]]


def test_label_with_a_pipe_does_not_break_the_tables() -> None:
    info = AdapterInfo(labels=("yes|no", "maybe"))
    run = RunSummary(
        label_counts={"train": {"yes|no": 3, "maybe": 4}},
        class_errors={name: {"support": 9, "wrong": 8, "false_positives": 1} for name in info.labels},
    )
    for table in tables(render(info, run)):
        assert {len(row) for row in table} == {len(table[0])}, table


@pytest.mark.parametrize("count", [20, 21])
def test_the_rows_of_many_labels_are_folded(count: int) -> None:
    names = tuple(f"label {number}" for number in range(count))
    run = RunSummary(
        label_counts={"train": dict.fromkeys(names, 3)},
        class_errors={name: {"support": 9, "wrong": 8, "false_positives": 1} for name in names},
    )
    text = render(AdapterInfo(labels=names), run)
    folded = [part.split("</details>")[0] for part in text.split("<details>")[1:]]
    long = [table for table in tables(text) if table[0][0] == "label"]
    assert [len(table) for table in long] == [count + 2, count + 2]
    assert len(folded) == text.count("</details>") == (2 if count > 20 else 0)
    for part, table in zip(folded, long, strict=False):
        # Markdown inside is rendered only between empty lines.
        assert part.startswith("<summary>All 21 labels</summary>\n\n| label |") and part.endswith("|\n\n")
        assert tables(part) == [table]


def test_calibration_is_prose_and_no_rows() -> None:
    measured = {
        "eval_accuracy": 0.9,
        "eval_calibration_error": 0.01234,
        "eval_calibration_error_uncalibrated": 0.10101,
        "test_calibration_error": 0.02347,
        "test_calibration_error_uncalibrated": 0.20202,
    }
    run = replace(RUN, metrics=measured)
    text = render(replace(INFO, temperature=1.98765), run)
    assert (
        "Scores are calibrated on the validation split, with a temperature of 1.988.\n"
        "Expected calibration error: 0.1010 before and 0.0123 after calibration (validation), "
        "0.2020 before and 0.0235 after calibration (test).\n"
        "peft and transformers give uncalibrated scores.\n"
    ) in text
    assert "calibration_error" not in text and "Scores are calibrated for such data only." in text
    plain = render(INFO, run)
    assert (
        "calibrated on" not in plain
        and "Scores are not calibrated: do not read them as probabilities." in plain
    )
    kind = "multi_label_classification"
    several = render(replace(INFO, problem_type=kind, temperature=2.0, thresholds=(0.2, 0.5, 0.7)), run)
    assert "(test).\nEach label has its own threshold. It was chosen on the validation split" in several
    assert all(len(row) == len(table[0]) for table in tables(several) for row in table)


# The training curve

LOG = [
    {"loss": 1.5, "step": 10},
    {"loss": 0.7, "step": 20},
    {"eval_loss": 0.8, "eval_accuracy": 0.75, "step": 20},
    {"loss": 0.4, "step": 30},
    {"train_runtime": 3.0, "step": 30},
]


def test_the_picture_is_a_png_that_shows_every_line():
    picture = training_curve(LOG)
    assert picture == training_curve(LOG)
    pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    colors = {tuple(round(255 * float(c)) for c in pixel) for pixel in pixels[..., :3].reshape(-1, 3)}
    assert {(0x4A, 0x6F, 0xA5), (0xC1, 0x66, 0x6B), (0x48, 0x80, 0x6A)} <= colors


@pytest.mark.parametrize("log", [[], [{"loss": 1.0, "step": 1}], [{"train_runtime": 1.0, "step": 1}]])
def test_less_than_two_points_are_no_curve(log):
    assert training_curve(log) is None
