"""The page of a report, against scikit-learn, arithmetic by hand and a browser."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_insight import HOSTILE, LABELS, MULTI_INFO, REGRESSION_INFO, Page, judge, judged, outputs
from sklearn import metrics as sk
from tiny_run import HANGS

from hf_lora.adapters.directory import read_adapter
from hf_lora.insight.page import render
from hf_lora.insight.report import collect
from hf_lora.tasks.mistakes import Evaluation


def page_of(adapter_dir: Path, made: Evaluation | None) -> str:
    report = collect(read_adapter(adapter_dir), evaluation=made, measured_on="x.csv", setting="fp32")
    return render(replace(report, share=(149_381, 22_862_597)))


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
    assert ["roles", "query, key, value, output"] in page.tables["facts"]
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
    assert not {"script", "iframe", "base"} & set(page.tags)
    assert {address.partition(";")[0] for address in page.addresses} == {"data:,", "data:image/svg+xml"}
    assert "\x1b" not in text and "\u202e" not in text and "\\u202e" in text
    assert '<script>fetch("http://192.0.2.1/x")</script>' in page.text
    assert "default-src 'none'" in text
    shown = [html.unescape(part.partition("</blockquote>")[0]) for part in text.split("<blockquote>")[1:]]
    # 420 characters and the mark of a cut; what is escaped, is longer.
    assert max(map(len, shown)) <= 422 + 10 and any(part.endswith(" word …") for part in shown)


def test_without_labelled_data_only_what_the_files_know(adapter_dir: Path, tmp_path: Path):
    shutil.copytree(adapter_dir, tmp_path / "run")
    page = Page(page_of(tmp_path / "run", None))
    assert "confusion" not in page.tables and "results" not in page.tables and "losses" not in page.tables
    assert "training curve: no trainer_state.json with losses" in page.text
    assert "no labelled data were given" in page.text

    classes = {"negative": {"support": 1204, "wrong": 3, "wrong_disabled": 4}}
    recorded = {"eval_accuracy": 0.75, "eval_accuracy_disabled": 0.5, "class_errors": classes}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(recorded))
    log = [{"step": 10, "loss": 1.5}, {"step": 20, "loss": 0.75}, {"step": 20, "eval_loss": 0.6}]
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    text = page_of(tmp_path / "run", None)
    page = Page(text)
    assert page.tables["recorded"] == [
        ["metric", "with adapter", "encoder without adapter"],
        ["validation accuracy", "0.7500", "0.5000"],
    ]
    assert page.tables["classes"][1][:4] == ["negative", "1,204", "3", "4"]
    assert "training and validation loss by step" in text


def test_other_problem_types_have_a_page(adapter_dir: Path):
    truth = np.random.default_rng(3).integers(0, 2, (20, 3)).astype(np.float32)
    made = judge(MULTI_INFO, ["t"] * 20, truth, outputs(4, 20), outputs(5, 20))
    page = Page(page_of(adapter_dir, made))
    assert "confusion" not in page.tables and "were not given it" in page.text and "calibration" in page.text
    numbers = np.linspace(0, 1, 20)
    made = judge(REGRESSION_INFO, ["t"] * 20, numbers, outputs(4, 20, 1), outputs(5, 20, 1))
    text = page_of(adapter_dir, made)
    assert 'alt="predicted by true value"' in text
    assert "The worst errors" in text and "Calibration" not in text and "Confusion" not in text


def test_without_matplotlib_there_are_tables_only(adapter_dir: Path, monkeypatch: pytest.MonkeyPatch):
    made, *_ = judged()
    with_charts = Page(page_of(adapter_dir, made))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(page_of(adapter_dir, made))
    assert "img" in with_charts.tags and "img" not in page.tags
    assert page.tables == with_charts.tables
    assert "charts: matplotlib is not installed; try `pip install 'hf-lora[plots]'`" in page.text


def test_the_same_report_is_the_same_page(adapter_dir: Path):
    made, *_ = judged()
    assert page_of(adapter_dir, made) == page_of(adapter_dir, made)


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
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-500:]
    return run.stdout, (folder / "net.json").read_text()


@pytest.mark.slow
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
    assert page.tags.count("img") == 6 and page.tags.count("script") == 0
    counts = sk.confusion_matrix(references, logits.argmax(1)).tolist()
    assert [row[1:] for row in page.tables["confusion"][1:4]] == [list(map(str, row)) for row in counts]
    assert "What this page does not show" in page.text and page.tags.count("li") == made.wrong + 1
    assert paths == [] and here not in network
    # The same text unescaped, without the page's policy, does ask: this test would have seen it.
    _, network = opened(chromium, HOSTILE.replace("192.0.2.1", here), tmp_path / "control")
    assert "/y.png" in paths and here in network
