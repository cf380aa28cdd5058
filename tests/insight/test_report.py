"""What a report says, against sklearn, arithmetic by hand and a browser."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.info import AdapterInfo
from hf_lora.insight import charts, judgement, pages, report
from hf_lora.insight.judgement import judge
from hf_lora.insight.report import Measured, collect
from hf_lora.tasks import MULTI, REGRESSION, SINGLE, task_of
from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.mistakes import measurer

LABELS = ("arts & <b>crafts</b>", "sports", "tech|x")
INFO, MULTI_INFO = AdapterInfo(LABELS), AdapterInfo(LABELS, MULTI)
REGRESSION_INFO = AdapterInfo(("score",), REGRESSION)
HOSTILE = '<script>fetch("http://192.0.2.1/x")</script><img src=http://192.0.2.1/y.png>\u202e[31m'


def outputs(seed: int, examples: int = 60, labels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(examples, labels)) * 2


def judged(mistakes: int = 12) -> tuple[judgement.Judgement, np.ndarray, np.ndarray, np.ndarray]:
    references = np.random.default_rng(9).integers(0, 3, 60)
    logits, disabled = outputs(1), outputs(2)
    logits[np.arange(45), references[:45]] += 4
    texts = [f"text {row} {HOSTILE if row > 40 else ''} " + "word " * row * 3 for row in range(60)]
    made = judge(INFO, texts, references, logits, disabled, mistakes=mistakes)
    return made, references, logits, disabled


class Page(HTMLParser):
    """The tables by the id of their section, all visible text, and every address in an attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.open = "", [""]
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            str(values[name]) for name in ("src", "href", "srcset", "data", "action") if name in values
        ]
        self.open.append(tag)
        if tag in ("section", "div") and values.get("id"):
            self.section = str(values["id"])
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(adapter_dir: Path, made: judgement.Judgement | None, suffix: str = ".html", **known: Any) -> str:
    measured = made and Measured(
        made, known.get("problem_type", SINGLE), known.get("labels", LABELS), "x.csv", "fp32", 2
    )
    return pages.render(
        collect(read_adapter(adapter_dir), measured=measured, count=(149_381, 22_862_597)), suffix
    )


def test_single_label_results_are_those_of_sklearn():
    made, references, logits, disabled = judged()
    for found, outs in ((made.confusion, logits), (made.confusion_disabled, disabled)):
        np.testing.assert_array_equal(found, sk.confusion_matrix(references, outs.argmax(1), labels=range(3)))
    assert made.metrics["accuracy"] == pytest.approx(sk.accuracy_score(references, logits.argmax(1)))
    wrong = [row for row in range(60) if logits[row].argmax() != references[row]]
    assert made.wrong == len(wrong) and made.examples == 60
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = {row: -np.log(probabilities[row, references[row]]) for row in wrong}
    order = sorted(wrong, key=lambda row: -losses[row])[:12]
    assert [m.text.split()[1] for m in made.mistakes] == [str(row) for row in order]
    for mistake, row in zip(made.mistakes, order, strict=True):
        assert mistake.loss == pytest.approx(losses[row])
        assert mistake.confidence == pytest.approx(probabilities[row].max())
        assert (mistake.truth, mistake.given) == (LABELS[references[row]], LABELS[logits[row].argmax()])
        assert mistake.disabled == LABELS[disabled[row].argmax()]
    for label, index in zip(LABELS, range(3), strict=True):
        there = references == index
        expected = {
            "support": there.sum(),
            "wrong": (logits.argmax(1) != references)[there].sum(),
            "wrong_disabled": (disabled.argmax(1) != references)[there].sum(),
        }
        assert expected.items() <= made.classes[label].items()


def test_calibration_is_its_definition():
    made, references, logits, _ = judged()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, correct = probabilities.max(1), logits.argmax(1) == references
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.sum() / 60 * abs(correct[inside].mean() - confidence[inside].mean())
    assert made.calibration is not None and made.calibration.error == pytest.approx(error)
    assert made.calibration.accuracy == pytest.approx(correct.mean())
    assert sum(entry.count for entry in made.calibration.bins) == 60


def test_multi_label():
    truth = np.random.default_rng(3).integers(0, 2, (40, 3)).astype(np.float32)
    logits, disabled = outputs(4, 40), outputs(5, 40)
    made = judge(MULTI_INFO, ["t"] * 40, truth, logits, disabled, mistakes=3)
    given = logits > 0
    assert made.wrong == 40 - round(40 * sk.accuracy_score(truth, given))
    for index, label in enumerate(LABELS):
        _, (missed, _) = sk.confusion_matrix(truth[:, index], given[:, index])
        assert made.classes[label]["wrong"] == missed
    probabilities = 1 / (1 + np.exp(-logits))
    losses = [sk.log_loss(truth[row], probabilities[row], labels=[0, 1]) for row in range(40)]
    assert made.mistakes[0].loss == pytest.approx(max(losses), rel=1e-5)
    assert made.calibration is not None
    assert made.calibration.accuracy == pytest.approx((given == truth).mean())
    assert made.calibration.confidence == pytest.approx(np.maximum(probabilities, 1 - probabilities).mean())
    assert not made.confusion


def test_a_temperature_changes_confidences_and_losses_and_nothing_else():
    plain, references, logits, disabled = judged()
    info = AdapterInfo(LABELS, temperature=2.5)
    made = judge(info, ["t"] * 60, references, logits, disabled)
    # The same as of logits that are smaller.
    small = judge(INFO, ["t"] * 60, references, logits / 2.5, disabled / 2.5)
    assert (made.calibration, made.calibration_disabled) == (small.calibration, small.calibration_disabled)
    assert made.mistakes == small.mistakes and made.classes == plain.classes
    assert made.calibration.error != plain.calibration.error
    assert {**made.metrics, "calibration_error": 0} == {**plain.metrics, "calibration_error": 0}
    assert made.metrics["calibration_error"] == made.calibration.error


def test_thresholds_decide_and_leave_probabilities_alone():
    truth = np.random.default_rng(3).integers(0, 2, (40, 3)).astype(np.float32)
    logits, disabled = outputs(4, 40), outputs(5, 40)
    thresholds = (0.2, 0.5, 0.9)
    info = AdapterInfo(LABELS, MULTI, temperature=2.0, thresholds=thresholds)
    made = judge(info, ["t"] * 40, truth, logits, disabled, mistakes=40)
    scores = 1 / (1 + np.exp(-logits / 2))
    given = scores > thresholds
    assert (given != (logits > 0)).any(0).tolist() == [True, False, True]
    for average in ("macro", "micro"):
        expected = sk.f1_score(truth, given, average=average)
        assert made.metrics[f"f1_{average}"] == pytest.approx(expected)
    assert made.metrics["roc_auc"] == pytest.approx(sk.roc_auc_score(truth, scores))
    assert made.wrong == (given != truth).any(1).sum() == len(made.mistakes)
    without = 1 / (1 + np.exp(-disabled / 2)) > thresholds
    assert made.metrics_disabled["accuracy"] == pytest.approx(sk.accuracy_score(truth, without))
    for column, label in enumerate(LABELS):
        _, (missed, _) = sk.confusion_matrix(truth[:, column], given[:, column])
        assert made.classes[label]["wrong"] == missed
    losses = [sk.log_loss(truth[row], scores[row], labels=[0, 1]) for row in range(40)]
    wrong = (given != truth).any(1)
    assert [m.loss for m in made.mistakes] == pytest.approx(sorted(np.array(losses)[wrong], reverse=True))
    # The calibration error by an independent loop: of the likelier answer, whatever the thresholds.
    likelier, right = np.maximum(scores, 1 - scores).ravel(), ((scores > 0.5) == truth).ravel()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (likelier > low) & (likelier <= low + 1 / 15)
        if inside.any():
            error += inside.sum() / 120 * abs(right[inside].mean() - likelier[inside].mean())
    assert made.calibration.error == pytest.approx(error)
    assert made.metrics["calibration_error"] == pytest.approx(error)
    assert measurer(info.task, LABELS, info.calibration)(logits, truth) == made.metrics
    assert task_of(REGRESSION).reliability(logits[:, :1], truth[:, 0], Calibration()) is None


def test_regression():
    truth = np.array([1.0, 2.0, 3.0])
    logits, disabled = np.array([[1.5], [2.0], [1.0]]), np.zeros((3, 1))
    made = judge(REGRESSION_INFO, ["a", "b", "c"], truth, logits, disabled, mistakes=2)
    assert made.points == [(1.0, 1.5), (2.0, 2.0), (3.0, 1.0)]
    assert [(m.text, m.truth, m.given, m.disabled, m.loss) for m in made.mistakes] == [
        ("c", "3", "1", "0", 4.0),
        ("a", "1", "1.5", "0", 0.25),
    ]
    assert made.metrics["mse"] == pytest.approx(4.25 / 3) and made.calibration is None


def test_the_page_has_the_numbers(adapter_dir: Path):
    made, references, logits, disabled = judged()
    page = Page(page_of(adapter_dir, made))
    counts = sk.confusion_matrix(references, logits.argmax(1))
    without = sk.confusion_matrix(references, disabled.argmax(1))
    header = ["", *LABELS]
    rows = [[label, *map(str, row)] for label, row in zip(LABELS, counts.tolist(), strict=True)]
    rows_disabled = [[label, *map(str, row)] for label, row in zip(LABELS, without.tolist(), strict=True)]
    assert page.tables["confusion"] == [header, *rows, header, *rows_disabled]
    results = {row[0]: row[1:] for row in page.tables["results"]}
    for name, average in (("precision macro", "macro"), ("f1 weighted", "weighted")):
        score = sk.precision_score if name.startswith("precision") else sk.f1_score
        expected = [f"{score(references, o.argmax(1), average=average):.4f}" for o in (logits, disabled)]
        assert results[name] == expected
    classes = {row[0]: row[1:4] for row in page.tables["classes"]}
    for index, label in enumerate(LABELS):
        sums = counts[index].sum(), counts[index].sum() - counts[index, index]
        assert classes[label] == [*map(str, sums), str(without[index].sum() - without[index, index])]
    assert f"expected calibration error {made.calibration.error:.4f}" in page.text
    assert "0.65 % trained: 149,381 of 22,862,597 parameters" in page.text
    assert f"12 of {made.wrong} wrong texts" in page.text
    facts = {row[0]: row[1] for row in page.tables["facts"]}
    assert facts["adapted"] == "8 modules: query, key, value, output" and facts["rank, alpha"].startswith(
        "4, 8;"
    )
    files = read_adapter(adapter_dir)
    tensors = {key: tensor.double().numpy() for key, tensor in files.tensors.items()}
    name = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_{}.weight"
    values = np.linalg.svd(2 * tensors[name.format("B")] @ tensors[name.format("A")], compute_uv=False)[:4]
    norms, ranks = page.tables["updates"][:3], page.tables["updates"][3:6]
    assert norms[0] == ["", "query", "key", "value", "output"] and norms[2][0] == "1"
    assert norms[2][3] == f"{np.sqrt((values**2).sum()):.2f}"
    shares = values / values.sum()
    assert ranks[2][3] == f"{np.exp(-(shares * np.log(shares)).sum()):.2f}"


def test_texts_of_others_stay_texts(adapter_dir: Path):
    made, *_ = judged(mistakes=60)
    assert any(HOSTILE[:8] in mistake.text for mistake in made.mistakes)
    text = page_of(adapter_dir, made)
    page = Page(text)
    assert not {"script", "img", "iframe", "b c", "base"} & set(page.tags)
    assert set(page.addresses) == {"data:,"}
    assert "\x1b" not in text and "\u202e" not in text and "\\u202e" in text
    assert '<script>fetch("http://192.0.2.1/x")</script>' in page.text
    assert "default-src 'none'" in text
    shown = [html.unescape(part.partition("</blockquote>")[0]) for part in text.split("<blockquote>")[1:]]
    # 420 characters and the mark of a cut; what is escaped, is longer.
    assert max(map(len, shown)) <= 422 + 10 and any(part.endswith(" word …") for part in shown)
    markdown = page_of(adapter_dir, made, ".md")
    assert "<script" not in markdown and "\x1b" not in markdown and "<b>" not in markdown
    assert "| tech\\|x |" in markdown
    # Every row of a table has the columns of its header, whatever its texts hold.
    table = [
        line.replace("\\|", "") for line in markdown.splitlines() if line.startswith("| ") and "text" in line
    ]
    assert {line.count("|") for line in table if "word word" in line} == {7}


def test_without_labelled_data_only_what_the_files_know(adapter_dir: Path, tmp_path: Path):
    shutil.copytree(adapter_dir, tmp_path / "run")
    page = Page(page_of(tmp_path / "run", None))
    assert "confusion" not in page.tables and "results" not in page.tables and "curve" not in page.tables
    assert "training curve: neither the adapter nor a checkpoint beside it" in page.text
    assert "no labelled data were given" in page.text

    classes = {"negative": {"support": 1204, "wrong": 3, "wrong_disabled": 4}}
    recorded = {
        "eval_accuracy": 0.75,
        "eval_accuracy_disabled": 0.5,
        "eval_runtime": 3.0,
        "class_errors": classes,
    }
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(recorded))
    for step, losses in ((9, [9.0]), (20, [1.5, 0.75])):
        log = [{"step": 10 * n, "loss": loss} for n, loss in enumerate(losses, 1)] + [
            {"step": 20, "eval_loss": 0.6}
        ]
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(
            json.dumps({"log_history": log})
        )
    made = collect(read_adapter(tmp_path / "run"))
    assert made.history is not None and made.history.source == "checkpoint-20/trainer_state.json"
    assert made.history.training == [(10, 1.5), (20, 0.75)] and made.history.validation == [(20, 0.6)]
    page = Page(pages.render(made, ".html"))
    assert page.tables["recorded"][1:] == [["validation accuracy", "0.7500", "0.5000"]]
    assert page.tables["classes"][1][:4] == ["negative", "1,204", "3", "4"]
    assert page.tags.count("polyline") >= 2 and "training loss" in page.text
    assert "| 20 | 0.7500 | 0.6000 |" in pages.render(made, ".md")


def test_baselines_and_what_was_before_calibration_are_columns(adapter_dir: Path, tmp_path: Path):
    shutil.copytree(adapter_dir, tmp_path / "run")
    recorded = {
        "eval_accuracy": 0.75,
        "eval_accuracy_disabled": 0.5,
        "eval_accuracy_majority": 0.25,
        "eval_accuracy_probe": 0.625,
        "eval_calibration_error": 0.0125,
        "eval_calibration_error_uncalibrated": 0.0625,
        "test_accuracy": 0.875,
        "test_runtime": 9.0,
    }
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(recorded))
    made = collect(read_adapter(tmp_path / "run"))
    table = [
        [
            "metric",
            "with the adapter",
            "adapter disabled",
            "before calibration",
            "majority class",
            "linear probe",
        ],
        ["validation accuracy", "0.7500", "0.5000", "", "0.2500", "0.6250"],
        ["validation calibration error", "0.0125", "", "0.0625", "", ""],
        ["test accuracy", "0.8750", "", "", "", ""],
    ]
    assert Page(pages.render(made, ".html")).tables["recorded"] == table
    lines = pages.render(made, ".md").splitlines()
    first = lines.index("## Results of the training run") + 2
    as_lists = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first : first + 5]]
    assert as_lists == [table[0], ["---"] * 6, *table[1:]]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"log_history": 3}',
        '{"log_history": [3, {"step": "x", "loss": NaN}, {"step": 1, "loss": []}]}',
    ],
)
def test_files_beside_the_adapter_may_be_anything(adapter_dir: Path, tmp_path: Path, content: str):
    shutil.copytree(adapter_dir, tmp_path / "run")
    for name in ("metrics.json", "trainer_state.json"):
        (tmp_path / "run" / name).write_text(content)
    made = collect(read_adapter(tmp_path / "run"))
    assert made.history is None
    assert "training curve" in Page(pages.render(made, ".html")).text
    huge = 10**400
    row = {"support": huge, "wrong": 1, "wrong_disabled": 1}
    for broken in (
        {"class_errors": {"a": {"support": -1}}},
        {"class_errors": {"a": {**row, "support": -1}}},
        {"class_errors": 3, "total_parameters": 0, "trainable_parameters": 0, "epochs": "x", "eval_f1": [1]},
        {"class_errors": {"a": row}, "total_parameters": 1, "trainable_parameters": huge, "eval_f1": huge},
    ):
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(broken))
        made = collect(read_adapter(tmp_path / "run"))
        assert made.classes == {} and made.share is None and made.recorded_results == []
        pages.render(made, ".html")


def test_an_adapter_that_was_trained_once_more_says_so(adapter_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_dir, tmp_path / "run")
    recorded = {"train_runtime": 3.0, "global_step": 1_200, "epochs": 2.0}
    for refit, expected in (({}, None), ({"refit_examples": 1_000}, "once more, on all 1,000 examples")):
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(recorded | refit))
        facts = dict(collect(read_adapter(tmp_path / "run")).facts)
        assert (facts["training"], facts.get("refit")) == ("3 s, 1,200 steps", expected)


def test_other_problem_types_have_a_page(adapter_dir: Path):
    truth = np.random.default_rng(3).integers(0, 2, (20, 3)).astype(np.float32)
    made = judge(MULTI_INFO, ["t"] * 20, truth, outputs(4, 20), outputs(5, 20))
    page = Page(page_of(adapter_dir, made, problem_type="multi_label_classification"))
    assert "confusion" not in page.tables and "were not given it" in page.text and "calibration" in page.text
    numbers = np.linspace(0, 1, 20)
    made = judge(REGRESSION_INFO, ["t"] * 20, numbers, outputs(4, 20, 1), outputs(5, 20, 1))
    text = page_of(adapter_dir, made, problem_type="regression", labels=("score",))
    assert text.count("<circle") >= 20 and "The worst errors" in text and "Calibration" not in text
    for kind in ("regression",):
        assert "Confusion" not in page_of(adapter_dir, made, ".md", problem_type=kind, labels=("score",))


def test_another_suffix_is_a_mistake(adapter_dir: Path):
    with pytest.raises(ValueError, match=r"written as \.html or \.md; got '\.pdf'"):
        page_of(adapter_dir, None, ".pdf")


def test_ticks_are_round_and_cover():
    assert charts.ticks(0, 1.5) == [0, 0.5, 1, 1.5]
    assert charts.ticks(-3, 38) == [-10, 0, 10, 20, 30, 40]
    assert charts.ticks(0, 0) == [0, 0.2]
    for low, high in ((0.0, 1e-9), (5.0, 5.0), (-2e6, 3e6), (0.1, 0.3)):
        found = charts.ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9


def test_a_line_goes_through_its_points():
    svg = str(
        charts.line_chart([charts.Series("a<b", [(0, 0), (5, 2), (10, 4)])], "x", "y", width=468, height=154)
    )
    # 400 wide from 52, 100 high from 14; y from 0 to 4.
    assert 'points="52.0,114.0 252.0,64.0 452.0,14.0"' in svg and "a&lt;b" in svg
    assert len(charts.shades(3)) == 3 and charts.shades(1) == ["#b0ceeb"]


def test_a_thousand_points_are_enough():
    assert report._thinned([(step, 0.0) for step in range(2500)])[:3] == [(0, 0.0), (3, 0.0), (6, 0.0)]


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed, so the page is not opened in a browser")
    return found


@pytest.fixture
def asked() -> Iterator[tuple[int, list[str]]]:
    """A server on this machine: its port, and the paths that it is asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            """Nothing to standard error."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, paths
    server.shutdown()
    server.server_close()


def opened(chromium: str, text: str, folder: Path) -> tuple[str, str]:
    """The document as a browser has it after loading a page, and the browser's own log of its network."""
    folder.mkdir()
    (folder / "page.html").write_text(text, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    command = [
        *(
            chromium,
            *flags.split(),
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={folder / 'profile'}",
        ),
        *(f"--log-net-log={folder / 'net.json'}", "--dump-dom", f"file://{folder / 'page.html'}"),
    ]
    environment = {**os.environ, "HOME": str(folder)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-500:]
    return run.stdout, (folder / "net.json").read_text()


def test_a_browser_shows_it_and_asks_nobody(
    chromium: str, adapter_dir: Path, tmp_path: Path, asked: tuple[int, list[str]]
):
    port, paths = asked
    made, references, logits, _ = judged(mistakes=60)
    here = f"127.0.0.1:{port}"
    text = page_of(adapter_dir, made).replace("192.0.2.1", here)
    assert here in text
    document, network = opened(chromium, text, tmp_path / "page")
    page = Page(document)
    assert {"facts", "results", "classes", "confusion", "updates"} <= set(page.tables)
    # Two reliability diagrams and the singular values of four roles.
    assert page.tags.count("svg") == 6 and page.tags.count("script") == 0
    counts = sk.confusion_matrix(references, logits.argmax(1)).tolist()
    assert [row[1:] for row in page.tables["confusion"][1:4]] == [list(map(str, row)) for row in counts]
    assert "What this page does not show" in page.text and page.tags.count("li") == made.wrong + 1
    assert paths == [] and here not in network
    # The same text unescaped, without the page's policy, does ask: this test would have seen it.
    _, network = opened(chromium, HOSTILE.replace("192.0.2.1", here), tmp_path / "control")
    assert "/y.png" in paths and here in network
