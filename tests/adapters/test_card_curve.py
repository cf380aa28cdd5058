"""The training curve: a picture of the log, the same for the same log."""

import io

import matplotlib.image
import pytest

from hf_lora.adapters.card import training_curve

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
