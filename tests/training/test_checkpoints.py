"""Checkpoints are whole or not there; SIGTERM saves one, and the resumed run ends as if it had not come."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from conftest import write_texts
from helpers_recipe import command, run_training
from helpers_training import Terminate, assert_same_tensors, trainer

from hf_lora._files import replacing
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.recipe.finetune import Finetuning
from hf_lora.training.checkpoints import (
    CHECKSUMS,
    EXIT_CODE,
    Preempted,
    checkpoints,
    clear_leftovers,
    newest_complete,
    problem,
    rotate,
    writing_checkpoint,
)


def write(output: Path, step: int, text: str = "state") -> Path:
    """A checkpoint with the two files that every one has, and two more, one of them in a folder."""
    target = output / f"checkpoint-{step}"
    with writing_checkpoint(target) as folder:
        (folder / "trainer_state.json").write_text(text * 2)
        (folder / "adapter_model.safetensors").write_bytes(bytes(range(200)))
        (folder / "state.json").write_text(text)
        (folder / "more").mkdir()
        (folder / "more" / "rng.pth").write_bytes(b"random")
    return target


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_a_checkpoint_appears_whole_with_the_digests_of_its_files(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-3"
    with writing_checkpoint(target) as folder:
        (folder / "state.json").write_text("hello")
        assert not target.exists() and checkpoints(tmp_path) == []
    assert names(tmp_path) == ["checkpoint-3"]
    listed = json.loads((target / CHECKSUMS).read_text())["files"]
    # sha256 of "hello".
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert listed == {"state.json": {"bytes": 5, "sha256": digest}}


def test_an_error_leaves_no_trace_and_the_older_one_untouched(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(RuntimeError, match="boom"), writing_checkpoint(tmp_path / "checkpoint-2") as folder:
        (folder / "state.json").write_text("half")
        raise RuntimeError("boom")
    assert names(tmp_path) == ["checkpoint-1"] and problem(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("left", [[], ["README.md"], ["trainer_state.json"], ["adapter_model.safetensors"]])
def test_a_list_that_lacks_what_every_checkpoint_has_is_not_whole(left: list[str], tmp_path: Path) -> None:
    older, target = write(tmp_path, 1), write(tmp_path, 2)
    listed = json.loads((target / CHECKSUMS).read_text())
    listed["files"] = {name: entry for name, entry in listed["files"].items() if name in left}
    (target / CHECKSUMS).write_text(json.dumps(listed))
    assert "checksums.json does not list " in (problem(target) or "")
    assert newest_complete(tmp_path)[0] == older


def test_only_the_writer_makes_and_names_the_folder(tmp_path: Path) -> None:
    target, waits = tmp_path / "checkpoint-1", []
    (tmp_path / ".checkpoint-1.partial").mkdir()
    with writing_checkpoint(target, writes=False, wait=lambda: waits.append(names(tmp_path))) as folder:
        (folder / "rng_state_1.pth").write_bytes(b"mine")
    assert len(waits) == 3 and names(tmp_path) == [".checkpoint-1.partial"]


def test_a_file_cut_off_at_any_byte_is_seen_and_the_one_before_is_used(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    files = [path for path in sorted(newer.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for length in {
            0,
            1,
            len(content) // 2,
            len(content) - 1,
            *random.Random(0).sample(range(len(content)), 3),
        }:
            path.write_bytes(content[:length])
            chosen, broken = newest_complete(tmp_path)
            assert chosen == older and list(broken) == [newer], (path.name, length)
        path.write_bytes(content)
    assert newest_complete(tmp_path) == (newer, {})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: (c / "state.json").unlink(), "state.json is missing"),
        (lambda c: (c / "state.json").write_text("stats"), "state.json was changed"),
        (lambda c: (c / "state.json").write_text("longer"), "has 6 bytes, expected 5"),
        (lambda c: (c / CHECKSUMS).unlink(), "checksums.json is missing"),
        (lambda c: (c / CHECKSUMS).write_text("[]"), "cannot be read"),
        (lambda c: (c / CHECKSUMS).write_text('{"files": {"a": 1}}'), "cannot be read"),
        (
            lambda c: (c / CHECKSUMS).write_text('{"files": {"../x": {"bytes": 1, "sha256": "a"}}}'),
            "names a file outside",
        ),
    ],
)
def test_what_is_wrong_is_named(harm, message: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1)
    harm(checkpoint)
    assert message in str(problem(checkpoint))


def test_order_is_by_number_and_other_names_are_left_alone(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


@pytest.mark.parametrize(
    ("limit", "best", "expected"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (1, 2, [2, 4]),
        (2, 1, [1, 4]),
        (3, 4, [2, 3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(limit, best, expected, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    rotate(tmp_path, limit, tmp_path / "checkpoint-4", best and f"elsewhere/checkpoint-{best}")
    assert [int(path.name.partition("-")[2]) for path in checkpoints(tmp_path)] == expected
    assert all(problem(path) is None for path in checkpoints(tmp_path))


def test_rotation_deletes_later_steps_of_a_run_that_was_given_up_first(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        write(tmp_path, step)
    rotate(tmp_path, 3, tmp_path / "checkpoint-3", None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 1, "first")
    target = write(tmp_path, 1, "second")
    assert (target / "state.json").read_text() == "second"
    assert names(tmp_path) == ["checkpoint-1"] and problem(target) is None


def test_leftovers_of_a_killed_run_go_and_a_replaced_checkpoint_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 1)
    os.rename(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-1.replaced")
    write(tmp_path, 2)
    for name in (".checkpoint-2.replaced", ".checkpoint-3.partial", ".checkpoint-0.deleted", ".checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".checkpoint-x", "checkpoint-1", "checkpoint-2"]
    assert problem(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("strategy", ["no", "epoch", "steps"])
def test_a_checkpoint_is_saved_and_the_resumed_run_ends_the_same(strategy, tmp_path):
    options = {"save_strategy": strategy, "save_steps": 4, "eval_strategy": "epoch"}
    undisturbed = trainer(tmp_path / "a", **options)
    undisturbed.train()
    run = trainer(tmp_path / "b", **options)
    run.add_callback(Terminate(3))
    with pytest.raises(Preempted) as caught:
        run.train()
    assert caught.value.code == EXIT_CODE == 143 and caught.value.step == 3
    assert [path.name for path in checkpoints(tmp_path / "b")] == ["checkpoint-3"]
    # What is due at the end of an epoch is not due in its middle.
    assert not [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(adapter_tensors(resumed.model), adapter_tensors(undisturbed.model))
    kept = ("loss", "eval_loss", "step")
    logs = [
        [{name: entry[name] for name in kept if name in entry} for entry in part.state.log_history[:-1]]
        for part in (resumed, undisturbed)
    ]
    assert logs[0] == logs[1]


def test_sigterm_in_the_last_save_ends_with_the_same_code_and_no_leftover(tmp_path, monkeypatch):
    run = trainer(tmp_path, save_strategy="steps", save_steps=6)
    monkeypatch.setattr(run, "_save_rng_state", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted) as caught:
        run.train()
    assert caught.value.code == EXIT_CODE and names(tmp_path) == ["checkpoint-6"]
    assert problem(tmp_path / "checkpoint-6") is None


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prepare_data", "load_model", "measure", "save"])
def test_sigterm_before_and_after_training_ends_with_the_same_code_and_no_leftover(
    step, tmp_path, tiny_bert_dir, monkeypatch
):
    def terminated(*_, **__):
        with replacing(tmp_path / "run" / "adapter"):
            os.kill(os.getpid(), signal.SIGTERM)

    write_texts(tmp_path / "texts.csv", 60)
    argv = command(tiny_bert_dir, tmp_path / "run", "--train_file", tmp_path / "texts.csv", "--max_steps", 2)
    monkeypatch.setattr(Finetuning, step, terminated)
    with pytest.raises(SystemExit) as caught:
        run_training([*argv, "--save_strategy", "no"])
    assert caught.value.code == EXIT_CODE and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert names(tmp_path) == ["texts.csv"]


def test_a_handler_of_the_program_stays(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        run = trainer(tmp_path)
        run.add_callback(Terminate(3))
        run.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and run.state.global_step == 6


def test_without_a_signal_nothing_is_saved_and_nothing_stays(tmp_path):
    run = trainer(tmp_path)
    callbacks = list(run.callback_handler.callbacks)
    run.train()
    assert checkpoints(tmp_path) == [] and run.callback_handler.callbacks == callbacks
