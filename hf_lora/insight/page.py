"""The page of a report: HTML that loads nothing and runs no script."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from typing import Any

import jinja2
from markupsafe import Markup

from hf_lora._text import printable
from hf_lora.insight.inspect import Grid, grid_of
from hf_lora.insight.report import Report
from hf_lora.tasks import task_of
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
    environment.filters["cut"] = _cut
    source = resources.files("hf_lora.insight").joinpath("report.html.jinja").read_text("utf-8")
    grid = grid_of(report.updates)
    charts = _charts(report, grid) if can_draw() else {}
    return environment.from_string(source).render(
        report=report,
        task=report.task or task_of(None),
        grid=grid,
        version=__version__,
        charts=charts,
        missing=report.missing if charts else [*report.missing, NO_CHARTS],
    )


def _charts(report: Report, grid: Grid) -> dict[str, Any]:
    """The addresses of the charts, by name; `spectra` by column of the grid."""
    from hf_lora.insight import plots

    top = max((value for update in report.updates for value in update.spectrum.values), default=0.0) or 1.0
    spectra: dict[str, list[list[float]]] = {}
    for cells in grid.values():
        for name, update in cells.items():
            spectra.setdefault(name, []).extend([update.spectrum.values] if update else [])
    charts: dict[str, Any] = {
        "spectra": {name: plots.spectrum_chart(lines, top) for name, lines in spectra.items()}
    }
    if report.history:
        charts["losses"] = plots.loss_chart(report.history)
    if report.evaluation:
        for name in ("calibration", "calibration_disabled"):
            if found := getattr(report.evaluation, name):
                charts[name] = plots.reliability_chart(found)
        if report.evaluation.points:
            charts["predictions"] = plots.prediction_chart(report.evaluation.points)
    return charts


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
