"""SIGTERM: a checkpoint of the very step, the exit code, and a run that ends as if it had not come."""

import os
import signal

import pytest
from transformers import TrainerCallback

from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.training.checkpoints import checkpoints
from hf_lora.training.preemption import EXIT_CODE, Preempted
from tests.training.test_trainer import assert_same_tensors, trainer


class Terminate(TrainerCallback):
    """Sends SIGTERM to this process in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


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
