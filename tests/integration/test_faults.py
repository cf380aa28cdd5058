"""scripts/check_faults.py and scripts/check_memory.py in short form: real processes, real kills."""

import random

import check_faults
import check_memory
import pytest
from tiny_run import write_base, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    write_base(directory / "base")
    write_texts(directory / "train.csv", 60)
    return directory


@pytest.fixture(scope="module")
def short(folder):
    """Four kills of a run of forty steps."""
    check_faults.STEPS = 40
    return check_faults.kills(folder, 4, random.Random(1))


def test_kills_lose_nothing(short):
    assert short["broken_checkpoints"] == 0 and short["steps_lost_to_a_broken_checkpoint"] == 0
    assert short["tensors_equal"] == short["tensors"] > 0 and not short["left_over"]


def test_cut_off_checkpoints_are_recognised(short, folder):
    cut = check_faults.cut_off(folder, random.Random(2), cuts=60)
    assert cut["recognised"] == cut["went_back"] == cut["cuts"] == 60


@pytest.mark.parametrize(
    ("name", "words"),
    [("full_disk", ["could not be written", "MB free"]), ("no_directory", ["Not a directory"])],
)
def test_disks_that_take_nothing_end_a_run_in_one_line(name, words, folder):
    result = check_faults.CHECKS[name](folder)
    assert result["exit_code"] == 2 and result["message"].startswith("hf-lora: ")
    assert all(word in result["message"] for word in words), result["message"]


def test_a_second_run_in_the_directory_is_refused(folder):
    result = check_faults.shared(folder)
    assert result["exit_code"] == 2 and "in use by another run at this moment" in result["message"]
    assert result["first"] == 0


def test_sigterm_ends_with_its_own_code(short, folder):
    result = check_faults.terminated(folder)
    assert result["exit_code"] == 143 and result["saved_step"] > 0 and result["resumed"] == 0
    assert result["tensors_equal"] == short["tensors"]


def test_a_run_does_not_grow(tmp_path):
    assert check_memory.measure(tmp_path, 400)["growth_mb"] < 8
