"""Kill a training run again and again, fill its disk, cut its checkpoints off: nothing is lost, nothing grows."""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import resident_mb
from safetensors.torch import load_file
from tiny_run import ENVIRONMENT, HANGS, train_command, until, write_base, write_texts
from transformers import AutoTokenizer, TrainerCallback

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, load_classifier
from hf_lora.data import DataConfig, prepare_data
from hf_lora.training.checkpoints import checkpoints, newest_complete, problem, step_of

pytestmark = pytest.mark.slow
STEPS, KILLS, CUTS = 40, 4, 60
SAVING = ".partial"


class Job:
    """A training run in a folder: how it is started, and what of it is on the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.output = folder / name
        more = "--save_total_limit 3 --logging_steps 1 --lora_dropout 0.1"
        self.command = train_command(folder, self.output, *more.split(), steps=STEPS)

    def start(self, *extra: str, **options: Any) -> subprocess.Popen[str]:
        """Start the run in a process of its own."""
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*self.command, *extra], env=ENVIRONMENT, **streams, **options)

    def finish(self, *extra: str, **options: Any) -> tuple[int, str]:
        """Run to the end: exit code and the last line on standard error."""
        process = self.start(*extra, **options)
        _, errors = process.communicate(timeout=HANGS)
        lines = [line for line in errors.splitlines() if line.strip()]
        return process.returncode, lines[-1] if lines else ""

    def newest(self) -> int:
        """The step of the newest whole checkpoint; 0 without one."""
        found = newest_complete(self.output)[0]
        return step_of(found) if found else 0

    def beyond(self, step: int) -> bool:
        """Whether a checkpoint after this step is whole."""
        return self.newest() > step

    def saving(self, step: int) -> bool:
        """Whether a checkpoint of this step or a later one is being written."""
        names = [path.name.removesuffix(SAVING) for path in self.output.glob(f".checkpoint-*{SAVING}")]
        return any(int(name.rpartition("-")[2]) >= step for name in names)

    def adapter(self) -> dict[str, Any]:
        """The tensors of the run's adapter."""
        return load_file(self.output / "adapter_model.safetensors")


def kill_when(
    process: subprocess.Popen[str], met: Callable[[], bool], delay: float, waits: float = HANGS
) -> None:
    """SIGKILL `delay` seconds after `met()`, or after `waits` seconds without."""
    if until(lambda: process.poll() is not None or met(), waits, pause=0.0002):
        time.sleep(delay)
    process.kill()
    process.communicate(timeout=HANGS)


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys() and all(bool((ours[key] == expected[key]).all()) for key in ours)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults")
    write_base(directory / "base")
    write_texts(directory / "train.csv", 60)
    return directory


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Job:
    job = Job(folder, "undisturbed")
    code, last = job.finish()
    assert code == 0, last
    return job


def test_kills_lose_nothing(undisturbed: Job, folder: Path) -> None:
    """SIGKILL at a random moment, or while a checkpoint is being written, which is most delicate."""
    rng = random.Random(1)
    job = Job(folder, "killed")
    for number in range(KILLS):
        before = job.newest()
        process = job.start("--resume_from_checkpoint")
        if number % 3:
            kill_when(process, partial(job.saving, before + 2 * rng.randint(1, 4)), rng.uniform(0.0, 0.03))
        else:
            waits = rng.choice([rng.uniform(0.0, 8.0), HANGS])  # the first may end while the run starts
            kill_when(process, partial(job.beyond, before), rng.uniform(0.0, 1.0), waits)
        assert [problem(path) for path in checkpoints(job.output) if problem(path)] == []
        assert job.newest() >= before
    code, last = job.finish("--resume_from_checkpoint")
    assert code == 0, last
    assert_same(job.adapter(), undisturbed.adapter())
    assert list(job.output.glob(".checkpoint-*")) == []


def test_cut_off_checkpoints_are_recognised(undisturbed: Job, tmp_path: Path) -> None:
    """A file cut off at a random byte is seen, and the checkpoint before it is used."""
    rng = random.Random(2)
    older, newer = checkpoints(undisturbed.output)[-2:]
    shutil.copytree(older, tmp_path / older.name)
    files = sorted(path.relative_to(newer) for path in newer.rglob("*") if path.is_file())
    for _ in range(CUTS):
        copy = shutil.copytree(newer, tmp_path / newer.name)
        victim = copy / rng.choice(files)
        os.truncate(victim, rng.randrange(victim.stat().st_size))
        chosen, broken = newest_complete(tmp_path)
        assert broken and chosen == tmp_path / older.name, victim
        shutil.rmtree(copy)


def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(folder: Path) -> None:
    job = Job(folder, "full")
    # The adapter has 35 kB, the optimizer's state 82 kB.
    for limit in (24_576, 60_000):
        bounded = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        code, last = job.finish("--overwrite_output_dir", preexec_fn=bounded)
        assert code == 2 and last.startswith("hf-lora: ")
        assert "could not be written" in last and "MB free" in last
        assert not job.output.exists()
    assert job.finish("--resume_from_checkpoint")[0] == 0


def test_a_directory_that_cannot_be_made_ends_a_run_in_one_line(folder: Path) -> None:
    (folder / "file").write_text("")
    code, last = Job(folder, "file/run").finish()
    assert code == 2 and last.startswith("hf-lora: ") and "Not a directory" in last


def test_a_second_run_in_the_directory_is_refused(folder: Path) -> None:
    job = Job(folder, "shared")
    first = job.start()
    assert until(lambda: job.newest() > 0 or first.poll() is not None)
    first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second has tried
    code, last = job.finish("--resume_from_checkpoint")
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=HANGS)
    assert code == 2 and "in use by another run at this moment" in last
    assert first.returncode == 0


def test_sigterm_saves_the_step_and_the_resumed_run_ends_as_if_undisturbed(
    undisturbed: Job, folder: Path
) -> None:
    job = Job(folder, "terminated")
    process = job.start()
    assert until(lambda: job.newest() > 0 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 143, errors[-2000:]
    assert f"SIGTERM: saved checkpoint-{job.newest()} in " in errors
    assert job.finish("--resume_from_checkpoint")[0] == 0
    assert_same(job.adapter(), undisturbed.adapter())


class Watch(TrainerCallback):
    """Notes the megabytes of the process at every twentieth step."""

    def __init__(self) -> None:
        self.points: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 20 == 0:
            gc.collect()
            self.points.append(resident_mb())


def test_a_run_does_not_grow(tmp_path: Path) -> None:
    """Texts of many lengths, dropout, evaluation and checkpoints on the way: the memory of the second half."""
    write_base(tmp_path / "base")
    write_texts(tmp_path / "train.csv", 400)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    data = prepare_data(DataConfig(train_file=str(tmp_path / "train.csv"), max_length=64), tokenizer)
    model, _ = load_classifier(str(tmp_path / "base"), data.labels, LoRAConfig(dropout=0.1))
    watch = Watch()
    arguments = LoRATrainingArguments(
        str(tmp_path / "run"),
        max_steps=400,
        per_device_train_batch_size=8,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="steps",
        save_steps=40,
        save_total_limit=2,
        logging_steps=50,
        disable_tqdm=True,
        use_cpu=True,
    )
    LoRATrainer(
        model=model,
        args=arguments,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=tokenizer,
        callbacks=[watch],
    ).train()
    late = np.array(watch.points[len(watch.points) // 2 :])
    assert late[-1] - late[0] < 8, watch.points
