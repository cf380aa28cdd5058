"""The page of a report: HTML that loads nothing and runs no script."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from typing import Any

import jinja2
from markupsafe import Markup

from hf_lora._text import printable
from hf_lora.insight.report import Report
from hf_lora.version import __version__

NO_CHARTS = "charts: matplotlib is not installed; try `pip install 'hf-lora[plots]'`"
# Longer texts are cut in the list of mistakes.
_TEXT_LENGTH = 420


def can_draw() -> bool:
    """Whether matplotlib is installed; without it a page has tables only and says so."""
    return find_spec("matplotlib") is not None


def render(report: Report) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=_shown,
    )
    environment.filters |= {"number": _number, "cut": _cut}
    source = resources.files("hf_lora.insight").joinpath("report.html.jinja").read_text("utf-8")
    charts = _charts(report) if can_draw() else {}
    return environment.from_string(source).render(
        report=report,
        version=__version__,
        charts=charts,
        missing=report.missing if charts else [*report.missing, NO_CHARTS],
        most=_largest(report),
    )


def _charts(report: Report) -> dict[str, Any]:
    """The addresses of the charts, by name; `spectra` by column of the grid."""
    from hf_lora.insight import plots

    top = max((max(update.spectrum.values, default=0.0) for update in report.updates), default=0.0) or 1.0
    spectra = {}
    for name, cells in zip(report.grid.columns, zip(*report.grid.cells, strict=True), strict=True):
        updates = [report.updates[index] for index in cells if index is not None]
        spectra[name] = plots.spectrum_chart([update.spectrum.values for update in updates], top)
    charts: dict[str, Any] = {"spectra": spectra}
    if report.history is not None:
        charts["losses"] = plots.loss_chart(report.history)
    if report.measured is not None:
        judgement = report.measured.judgement
        for name in ("calibration", "calibration_disabled"):
            if found := getattr(judgement, name):
                charts[name] = plots.reliability_chart(found)
        if judgement.points:
            charts["predictions"] = plots.prediction_chart(judgement.points)
    return charts


def _largest(report: Report) -> dict[str, float]:
    """The largest value of each heat map; its cell is the darkest."""
    values = {
        "norm": [update.spectrum.norm for update in report.updates],
        "effective_rank": [update.spectrum.effective_rank for update in report.updates],
        "relative": [entry.relative or 0.0 for entry in report.amplified if entry is not None],
    }
    return {name: max(entries, default=0.0) or 1.0 for name, entries in values.items()}


def _number(value: Any) -> str:
    """Four decimals of a fraction, a count with separators, nothing for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _cut(text: str) -> str:
    """A text on one line, cut after a word where it is long."""
    line = " ".join(text.split())
    if len(line) <= _TEXT_LENGTH:
        return line
    # Inside a word that is longer than most.
    end = max(line.rfind(" ", 0, _TEXT_LENGTH + 1), _TEXT_LENGTH - 30)
    return f"{line[:end]} …"


def _shown(value: Any) -> Any:
    """Texts of others without control characters; escaping follows."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
