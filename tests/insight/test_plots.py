"""The charts of a report: SVG whose lines and bars are read back."""

from __future__ import annotations

import re
from base64 import b64decode
from xml.etree import ElementTree

import numpy as np

from hf_lora.insight import plots
from hf_lora.insight.report import History
from hf_lora.tasks.calibration import reliability

SVG = "{http://www.w3.org/2000/svg}"


def drawn(address: str) -> ElementTree.Element:
    """The SVG in a `data:` address."""
    kind, content = address.split(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(b64decode(content))


def lines(svg: ElementTree.Element, colour: str) -> list[np.ndarray]:
    """The points `(n, 2)` of every line of a colour, in the order in which they were drawn."""
    paths = [path for path in svg.iter(f"{SVG}path") if f"stroke: {colour}" in path.get("style", "")]
    numbers = [re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")) for path in paths]
    return [np.array(found, float) for found in numbers if len(found) > 1]


def words(svg: ElementTree.Element) -> set[str]:
    return {"".join(text.itertext()) for text in svg.iter(f"{SVG}text")}


def test_losses_are_lines_through_their_points():
    history = History([(0, 0.0), (5, 2.0), (10, 4.0)], [(5, 1.0), (10, 3.0)], "x")
    svg = drawn(plots.loss_chart(history))
    training = lines(svg, plots.ACCENT)[0]
    # Equal steps to the right, and upwards, where y falls.
    np.testing.assert_allclose(np.diff(training, axis=0)[0], np.diff(training, axis=0)[1], atol=1e-3)
    assert (np.diff(training, axis=0) * [1, -1] > 0).all()
    validation = lines(svg, plots.BAD)[0]
    np.testing.assert_allclose(validation[:, 0], training[1:, 0], atol=1e-3)
    assert (validation[:, 1] > training[1:, 1]).all()
    assert {"step", "loss", "training loss", "validation loss"} <= words(svg)
    assert "validation loss" not in words(drawn(plots.loss_chart(History(history.training, [], "x"))))


def test_a_reliability_chart_has_a_bar_for_each_bin():
    found = reliability(np.array([0.2, 0.6, 0.6, 0.9]), np.array([0, 1, 0, 1], bool), bins=4)
    svg = drawn(plots.reliability_chart(found))
    bars = [path for path in svg.iter(f"{SVG}path") if f"fill: {plots.ACCENT}" in path.get("style", "")]
    strengths = [re.findall(r"opacity: (\S+?);", bar.get("style", "")) for bar in bars]
    assert strengths == [["0.65"], [], ["0.65"]]  # 1 is not written
    assert len(lines(svg, plots.BAD)) == 3
    assert {"confidence", "accuracy"} <= words(svg)


def test_predictions_are_thinned_out():
    for examples, dots in ((3, 3), (12_000, 4_000)):
        svg = drawn(plots.prediction_chart([(float(number), 1.0) for number in range(examples)]))
        assert sum(plots.ACCENT in use.get("style", "") for use in svg.iter(f"{SVG}use")) == dots


def test_spectra_share_a_scale_and_darken():
    low, high = (drawn(plots.spectrum_chart([[top, 1.0], [top / 2]], 4.0)) for top in (2.0, 4.0))
    assert [len(list(svg.iter(f"{SVG}path"))) > 4 for svg in (low, high)] == [True, True]
    assert {"index", "value"} <= words(low) and words(low) == words(high)


def test_the_same_chart_is_the_same_text():
    history = History([(0, 1.0), (5, 2.0)], [(5, 1.0)], "x")
    assert plots.loss_chart(history) == plots.loss_chart(history)
    assert b"<dc:date>" not in b64decode(plots.loss_chart(history).split(",")[1])
