"""Real processes over gloo: parity with one, one message for an error, SIGTERM for all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import check_distributed
import pytest
from safetensors.torch import load_file
from tiny_run import write_base, write_texts
from torch.testing import assert_close

from hf_lora.training.checkpoints import checkpoints, problem

CONFIGS = Path(__file__).parents[2] / "scripts" / "accelerate"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distributed")
    write_base(directory / "base")
    write_texts(directory / "train.csv", 60)
    return directory


def command(folder, output, *extra, config="cpu_2", steps=6):
    settings = {
        "model_name_or_path": folder / "base",
        "train_file": folder / "train.csv",
        "output_dir": output,
        "max_seq_length": 64,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "precision": "fp32",
        "disable_tqdm": "True",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    launch = ["--accelerate_config", config] if config else []
    return [sys.executable, "-m", "hf_lora.cli.main", "train", *flags, "--use_cpu", *launch, *extra]


def run(words):
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.parametrize("name", ["DDP", "FSDP2, 2 accumulated"])
def test_two_processes_are_one(name, tmp_path):
    reference = "one process, 2 accumulated" if "accumulated" in name else "one process"
    compared = check_distributed.compare(*(check_distributed.run(tmp_path, run) for run in (reference, name)))
    assert compared["equal"], compared
    assert compared["ranks"] == 2 and compared["evaluated"] == 37
    sent = compared["gradient_bytes"] or compared["collectives"]["reduce_scatter_base"]
    assert sent == compared["trained_bytes"]


def test_two_processes_start_along_the_gradient_of_one(folder, tmp_path):
    # So small a rate leaves A where it started.
    still = ("--learning_rate", "1e-12", "--refit", "never")
    for name, config in (("one", None), ("two", "cpu_2")):
        ended = run(command(folder, tmp_path / name, *still, config=config, steps=1))
        assert ended.returncode == 0, ended.stderr
        assert "LoRA: gradient (A along the gradient of " in ended.stdout
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    starts = [name for name in one if "lora_A" in name]
    assert starts
    for name in starts:
        assert_close(two[name].T @ two[name], one[name].T @ one[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", ["cpu_2", "cpu_2_fsdp2"])
def test_a_run_of_two_processes_resumes_bit_for_bit(config, folder, tmp_path):
    first = run(command(folder, tmp_path / "a", config=config))
    assert first.returncode == 0, first.stderr[-2000:]
    assert "processes: 2" in first.stdout
    # Sharded weights are not started anew, and so not trained once more.
    assert first.stdout.count("refit: on all ") == (config == "cpu_2")
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoint-6").glob("rng*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    expected = load_file(tmp_path / "a" / "adapter_model.safetensors")
    # The newest is cut off; the run goes on from the one before.
    (tmp_path / "a" / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"")
    again = run(command(folder, tmp_path / "a", "--resume_from_checkpoint", config=config))
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stderr.count("checkpoint-6 is not whole") == 1
    resumed = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all((resumed[key] == expected[key]).all() for key in expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [(("--label_column", "topic"), "'topic'"), (("--lora_target_modules", "q_proj"), "'q_proj'")],
)
def test_an_error_of_all_is_told_once(extra, message, folder, tmp_path):
    failed = run(command(folder, tmp_path / "a", *extra))
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if line.startswith("hf-lora: ")]
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("hf-lora: process ")
    assert not (tmp_path / "a").exists()


def test_an_error_of_one_ends_all_with_its_message(folder, tmp_path):
    """The second process finds other texts: nothing is trained, and nobody waits for ever."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "from hf_lora.cli.main import main\n"
        "if os.environ['RANK'] == '1':\n"
        f"    sys.argv[sys.argv.index({str(folder / 'train.csv')!r})] = {str(folder / 'other.csv')!r}\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    write_texts(folder / "other.csv", 60, seed=5)
    words = command(folder, tmp_path / "a", config=None)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "cpu_2.yaml"),
    ]
    start = time.monotonic()
    failed = run([*launch, str(script), *words[words.index("train") + 1 :]])
    assert failed.returncode != 0 and time.monotonic() - start < 90
    lines = [line for line in failed.stderr.splitlines() if line.startswith("hf-lora: ")]
    assert len(lines) == 1 and "another training set in process 1" in lines[0]


def test_sigterm_to_the_launcher_saves_one_checkpoint_of_all(folder, tmp_path):
    output = tmp_path / "a"
    process = subprocess.Popen(
        command(folder, output, "--save_steps", "100000", steps=100000),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        workers: list[int] = []
        deadline = time.monotonic() + 90
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            workers = [pid for pid in descendants(process.pid) if catches_sigterm(pid)]
        time.sleep(1.0)
        # As Slurm does: every process of the job gets it.
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    saved = checkpoints(output)
    assert len(saved) == 1 and problem(saved[0]) is None, errors[-2000:]
    assert process.returncode != 0
    state = json.loads((saved[0] / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 100000


def descendants(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found


def catches_sigterm(pid):
    """Whether a process of the run does; the launcher, which has a handler from its start, does not count."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(next(part for part in status.splitlines() if part.startswith("SigCgt:")).split()[1], 16)
    return b"accelerate" not in line.split(b"\0")[2] and bool(caught >> (signal.SIGTERM - 1) & 1)
