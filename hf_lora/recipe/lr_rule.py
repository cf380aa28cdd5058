"""What a learning-rate range test says: the smoothed loss, where the test ends, and the rate that it suggests.

Smith 2017 (arXiv:1506.01186), section 3.3: the loss while the learning rate grows a little at every step. It is flat
while the rate is too low, falls, and rises again. Losses of single batches are noisy, most of all beside what a
head that was fitted before can still gain, so that a slope counts only where it is clear. A straight line is fitted
by least squares to the losses of each decade of the rate. It is clear if it is steeper than four standard errors at the
scatter that the losses have while the rate is low, and than two at the scatter around itself: the losses scatter more
where the model learns, and one outlier makes no slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BETA = 0.9  # of the exponential mean: about the last ten losses count
SETTLED = 10  # steps until that mean is one of enough losses to compare with

_CLEAR, _CLEAR_ITSELF = 4.0, 2.0  # standard errors: at the scatter of low rates, around the line itself
_FEWEST = 9  # losses that a line is fitted to


@dataclass(frozen=True)
class LearningRateRange:
    """What was measured: for each step its rate, its loss before the update, and the mean of the losses so far.

    stopped: why the test ended before its last rate; None if it did not. asked: (low, high, steps).
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    stopped: str | None
    asked: tuple[float, float, int]


@dataclass(frozen=True)
class Suggestion:
    """A learning rate, two digits, the rule that gave it, and the figures it is chosen from.

    steepest: where the loss falls steepest; None where it falls nowhere clearly. lowest: where the smoothed loss is
    lowest. below_rise: a decade below where the loss clearly rises; None where it never does.
    """

    learning_rate: float
    rule: str
    steepest: float | None
    lowest: float
    below_rise: float | None


def schedule(low: float, high: float, steps: int) -> np.ndarray:
    """The rates of all steps, from low to high, each the same multiple of the one before.

    Raises ValueError for what is no range.
    """
    if not (0 < low < high < math.inf and high >= 10 * low):
        raise ValueError(
            f"the range of learning rates is not usable; got {low!r} to {high!r}; "
            "expected two numbers above 0, the second at least ten times the first; try 1e-5 and 1"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2 * SETTLED:
        raise ValueError(
            f"the steps of the range test are not usable; got {steps!r}; "
            f"expected a whole number of at least {2 * SETTLED}; try 100"
        )
    rates: np.ndarray = np.geomspace(low, high, steps)
    return rates


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential mean of the losses so far at each step, without its bias towards zero at the start."""
    mean, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = BETA * mean + (1 - BETA) * loss
        smoothed.append(mean / (1 - BETA**count))
    return smoothed


def diverged(losses: Sequence[float], smoothed: Sequence[float]) -> bool:
    """Whether the smoothed loss is above twice its lowest value and above every loss of the first ten steps.

    The second keeps a loss near zero, as of a head that was fitted before, from ending the test by its noise.
    """
    if len(losses) <= SETTLED:
        return False
    return smoothed[-1] > max(2 * min(smoothed[SETTLED - 1 :]), *losses[:SETTLED])


def suggest(found: LearningRateRange) -> Suggestion:
    """The rate where the loss falls steepest; where it never clearly falls, a decade below where it rises.

    The second is what a head that was fitted before asks for: it has little to gain and much to lose.
    Raises ValueError where the loss does neither, or rises from the start.
    """
    low, high, steps = found.asked
    width = _width(low, high, steps)
    count = len(found.losses)
    if count < width:
        raise ValueError(
            f"the range test ended too early to say anything; got {found.stopped} after {count} steps; "
            "expected a loss that stays finite at low rates; try a lower first rate, or look at the data"
        )
    slopes, errors = line_slopes(found.losses, width)
    # The lines within the first half of the rates: there is little to learn at these.
    usual = float(np.median(errors[: max(1, steps // 2 - width + 1)]))
    clear = np.maximum(_CLEAR * usual, _CLEAR_ITSELF * errors)
    lowest = SETTLED - 1 + int(np.argmin(found.smoothed[SETTLED - 1 :]))
    # What falls beyond the lowest loss is a recovery from a rate that was too high.
    falls = slopes < -clear
    falls[max(0, lowest - width // 2 + 1) :] = False
    rise = next((int(at) for at in np.flatnonzero(slopes > clear) if _stays(found, int(at), width)), None)
    if rise is None and found.stopped:
        # A loss that leaps up is far from a line: that it ended the test is clear enough.
        rise = count - width
    if not falls.any():
        _check_rise(rise, low, high)
    steepest = int(np.argmin(np.where(falls, slopes, np.inf))) + width // 2 if falls.any() else None
    below_rise = None if rise is None else found.rates[rise]
    chosen = below_rise if steepest is None else found.rates[steepest]
    assert chosen is not None
    return Suggestion(
        learning_rate=_rounded(chosen),
        rule="a decade below where the loss rises" if steepest is None else "where the loss falls steepest",
        steepest=None if steepest is None else found.rates[steepest],
        lowest=found.rates[lowest],
        below_rise=below_rise,
    )


def line_slopes(losses: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Slope per step, and its standard error, of the least-squares line through each `width` losses in a row.

    width: odd. Both have the shape `(len(losses) - width + 1,)`.
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(losses, dtype=float), width)
    places = np.arange(width) - width // 2
    squares = float((places**2).sum())
    slopes: np.ndarray = windows @ places / squares
    rests = windows - windows.mean(axis=1, keepdims=True) - slopes[:, None] * places
    errors: np.ndarray = np.sqrt((rests**2).sum(axis=1) / (width - 2) / squares)
    return slopes, errors


def _width(low: float, high: float, steps: int) -> int:
    """The steps of a decade, odd, at most a third of all and enough for a line."""
    decade = round((steps - 1) / math.log10(high / low))
    return max(_FEWEST, min(decade, steps // 3)) | 1


def _stays(found: LearningRateRange, start: int, width: int) -> bool:
    """Whether the smoothed loss, once it has risen, remains above what the losses were before: noise does not."""
    before = float(np.mean(found.losses[: start + width // 2]))
    return min(found.smoothed[start + width - 1 :]) > before


def _check_rise(rise: int | None, low: float, high: float) -> None:
    if rise is None:
        raise ValueError(
            f"no learning rate can be suggested: the loss neither falls nor rises between {low:g} and {high:g}; "
            "try a higher last rate, more steps or larger batches"
        )
    if rise == 0:
        raise ValueError(
            f"no learning rate can be suggested: the loss never falls and rises from {low:g} on; "
            "try a lower first rate"
        )


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
