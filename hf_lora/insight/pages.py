"""A report as one page: HTML that loads nothing and runs no script, or Markdown."""

from __future__ import annotations

import html
import re
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from hf_lora._text import printable
from hf_lora.insight import charts
from hf_lora.insight.charts import ACCENT, BAD, Series
from hf_lora.insight.report import Report
from hf_lora.version import __version__

TEMPLATES = {".html": "report.html.jinja", ".md": "report.md.jinja"}
# Longer texts are cut in the list of mistakes.
_TEXT_LENGTH = 420
_MOST_DOTS = 5000
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~!])")


def render(report: Report, suffix: str) -> str:
    """The page as text; `suffix` is ".html" or ".md". Raises ValueError for another one."""
    if suffix not in TEMPLATES:
        raise ValueError(
            f"a report is written as {' or '.join(TEMPLATES)}; got {suffix!r}; try --output report.html"
        )
    is_html = suffix == ".html"
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=is_html,
        finalize=_shown if is_html else _shown_in_markdown,
    )
    environment.filters |= {"number": _number, "cut": _cut}
    template = environment.from_string(
        resources.files("hf_lora.insight").joinpath(TEMPLATES[suffix]).read_text("utf-8")
    )
    return template.render(
        report=report,
        version=__version__,
        charts=_charts(report) if is_html else {},
        most=_largest(report),
    )


def _charts(report: Report) -> dict[str, Any]:
    made: dict[str, Any] = {"spectra": _spectra(report)}
    if report.history is not None:
        named = (("training loss", report.history.training), ("validation loss", report.history.validation))
        styles = ((ACCENT, False), (BAD, True))
        series = [
            Series(name, points, colour, dots)
            for (name, points), (colour, dots) in zip(named, styles, strict=True)
            if points
        ]
        made["curve"] = charts.line_chart(series, "step", "loss", width=1000, whole=True)
        made["curve_legend"] = [(entry.name, entry.colour) for entry in series]
    if report.measured is not None:
        judgement = report.measured.judgement
        for name in ("calibration", "calibration_disabled"):
            found = getattr(judgement, name)
            made[name] = found and charts.reliability_diagram(found.bins)
        if judgement.points:
            points = judgement.points[:: -(-len(judgement.points) // _MOST_DOTS)]
            made["scatter"] = charts.scatter(points, "true value", "predicted")
    return made


def _spectra(report: Report) -> list[tuple[str, Markup]]:
    """Singular values of each column of the grid, a line for every layer, all on one scale."""
    grid, top = report.grid, max((max(u.spectrum.values, default=0.0) for u in report.updates), default=0.0)
    colours = charts.shades(len(grid.rows))
    drawn = []
    for column, name in enumerate(grid.columns):
        series = []
        for row, colour in enumerate(colours):
            index = grid.cells[row][column]
            values = () if index is None else report.updates[index].spectrum.values
            if values:
                series.append(Series(grid.rows[row], list(enumerate(values, 1)), colour))
        # A line nobody sees, so that the pictures have one scale.
        scale = Series("", [(1, 0.0), (1, top)], "none")
        if series:
            drawn.append(
                (
                    name,
                    charts.line_chart([*series, scale], "index", "value", width=236, height=200, whole=True),
                )
            )
    return drawn


def _largest(report: Report) -> dict[str, float]:
    """The largest value of each heat map, which is its darkest."""
    relative = [entry.relative or 0.0 for entry in report.amplified if entry is not None]
    return {
        "norm": max((update.spectrum.norm for update in report.updates), default=0.0) or 1.0,
        "effective_rank": max((update.spectrum.effective_rank for update in report.updates), default=0.0)
        or 1.0,
        "relative": max(relative, default=0.0) or 1.0,
    }


def _number(value: Any) -> str:
    """Four digits after the point of a fraction, thousands apart in a count, nothing for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _cut(text: str) -> str:
    """A text in one line of readable length."""
    line = " ".join(text.split())
    if len(line) <= _TEXT_LENGTH:
        return line
    # At a space, unless the last word is no word.
    end = max(line.rfind(" ", 0, _TEXT_LENGTH + 1), _TEXT_LENGTH - 30)
    return f"{line[:end]} …"


def _shown(value: Any) -> Any:
    """What a template prints: text of others without characters that act; escaping follows."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _shown_in_markdown(value: Any) -> Any:
    """The same for Markdown, where escaping is ours: nothing in a text is markup, in a cell or out of it."""
    if not isinstance(value, str):
        return value
    return _MARKDOWN.sub(r"\\\1", html.escape(printable(value), quote=False))
