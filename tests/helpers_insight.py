"""Labels with markup in them, random outputs, and results that were measured on them."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np

from hf_lora.adapters.info import AdapterInfo
from hf_lora.tasks import MULTI, REGRESSION
from hf_lora.tasks.mistakes import Evaluation, evaluate

LABELS = ("arts & <b>crafts</b>", "sports", "tech|x")
INFO, MULTI_INFO = AdapterInfo(LABELS), AdapterInfo(LABELS, MULTI)
REGRESSION_INFO = AdapterInfo(("score",), REGRESSION)
HOSTILE = '<script>fetch("http://192.0.2.1/x")</script><img src=http://192.0.2.1/y.png>\u202e[31m'


def outputs(seed: int, examples: int = 60, labels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(examples, labels)) * 2


def judge(info: AdapterInfo, *outputs: Any, mistakes: int = 12) -> Evaluation:
    return evaluate(info.task, info.labels, info.calibration, *outputs, mistakes=mistakes)


def judged(mistakes: int = 12) -> tuple[Evaluation, np.ndarray, np.ndarray, np.ndarray]:
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
