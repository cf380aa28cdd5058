"""Real processes over gloo: parity with one, one message for an error, SIGTERM for all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import EVALUATED, STEPS
from safetensors.torch import load_file
from tiny_run import ENVIRONMENT, HANGS, train_command, until, write_base, write_texts
from torch.testing import assert_close

from hf_lora.training.checkpoints import checkpoints, problem

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "scripts" / "accelerate"
WORKER = Path(__file__).parents[1] / "distributed_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distributed")
    write_base(directory / "base")
    write_texts(directory / "train.csv", 60)
    return directory


def command(folder, output, *extra, config="cpu_2", steps=6):
    launch = ["--accelerate_config", config] if config else []
    return train_command(folder, output, *launch, *extra, steps=steps)


def launched(config, *words):
    program = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*program, "--config_file", str(CONFIGS / f"{config}.yaml"), *map(str, words)]


def run(words):
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=HANGS)


def worker(folder, batch, accumulated):
    return [str(WORKER), json.dumps({"folder": str(folder), "batch": batch, "accumulated": accumulated})]


def results(folder):
    """What a run's first process wrote: figures, and tensors to compare."""
    adapter = load_file(folder / "adapter_model.safetensors")
    flat = torch.cat([tensor.reshape(-1) for _, tensor in sorted(adapter.items())])
    figures = json.loads((folder / "result.json").read_text())
    return figures, {**load_file(folder / "steps.safetensors"), "adapter": flat}


def assert_equal(tensors, expected):
    """To 1e-5 of the largest value: only the order of sums differs. Adam magnifies that where gradients are tiny."""
    assert tensors["logits"].shape == (EVALUATED, 2)
    for name, tensor in expected.items():
        difference = (tensors[name] - tensor).abs().max() / tensor.abs().max()
        assert difference <= (1e-4 if name == "adapter" else 1e-5), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The tensors of one process, by the number of accumulated batches, which hold other examples."""
    found = {}
    for accumulated, batch in ((1, 16), (2, 8)):
        folder = tmp_path_factory.mktemp("one")
        ended = run([sys.executable, *worker(folder, batch, accumulated)])
        assert ended.returncode == 0, ended.stderr[-3000:]
        found[accumulated] = results(folder)[1]
    return found


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("config", ["cpu_2", "cpu_2_fsdp2"])
def test_two_processes_are_one(config, accumulated, reference, tmp_path):
    ended = run(launched(config, *worker(tmp_path, 8 // accumulated, accumulated)))
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures, tensors = results(tmp_path)
    assert figures["ranks"] == 2
    assert_equal(tensors, reference[accumulated])
    # Nothing but the trained parameters' gradients is sent at a step.
    sent = figures["gradient_bytes"] or figures["collectives"]["reduce_scatter_base"]
    assert sent == figures["trained_bytes"]


@pytest.fixture
def two_hosts():
    """Two network namespaces with a wire between them: their names, 10.99.7.1 and 10.99.7.2."""
    hosts = [f"hf_lora_{side}{os.getpid()}" for side in "ab"]

    def ip(*words):
        try:
            subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}")

    try:
        for host in hosts:
            ip("netns", "add", host)
        wires = f"link add wire0 netns {hosts[0]} type veth peer name wire1 netns {hosts[1]}"
        ip(*wires.split())
        for number, host in enumerate(hosts):
            ip("-n", host, "addr", "add", f"10.99.7.{number + 1}/24", "dev", f"wire{number}")
            for device in (f"wire{number}", "lo"):
                ip("-n", host, "link", "set", device, "up")
        yield hosts
    finally:
        if shutil.which("ip"):
            for host in hosts:
                subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_two_hosts_are_one_and_no_frozen_weight_leaves_them(two_hosts, reference, tmp_path):
    running = []
    for rank, host in enumerate(two_hosts):
        flags = f"--num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip 10.99.7.1"
        words = launched("cpu_2", *flags.split(), "--main_process_port", "29577")
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *words, *worker(tmp_path / f"host{rank}", 8, 1)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": f"wire{rank}"},
            )
        )
    errors = [process.communicate(timeout=HANGS)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    figures, tensors = results(tmp_path / "host0")
    assert_equal(tensors, reference[1])
    counter = "/sys/class/net/wire1/statistics/tx_bytes"
    counted = run(["ip", "netns", "exec", two_hosts[1], "cat", counter])
    assert figures["trained_bytes"] * STEPS < int(counted.stdout) < figures["frozen_bytes"]


def printed(word):
    """The commands of the guide that hold a word, with one line each."""
    text = (CONFIGS.parents[1] / "docs" / "guides" / "clusters.md").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if word in line.split() and line.count("--") > 2]


@pytest.mark.parametrize("word", ["scripts/accelerate/cpu_2.yaml", "cpu_2", "torchrun"])
def test_two_processes_train_together_as_the_guide_prints_it(word, folder, tmp_path):
    (tmp_path / "scripts").symlink_to(CONFIGS.parent)
    (tmp_path / "train.csv").symlink_to(folder / "train.csv")
    (words,) = printed(word)
    programs = {
        "accelerate": "accelerate.commands.accelerate_cli",
        "hf-lora": "hf_lora.cli.main",
        "torchrun": "torch.distributed.run",
    }
    words = [str(folder / "base") if each == "roberta-base" else each for each in words]
    words += ["--max_seq_length", "64", "--max_steps", "4"]  # the tiny encoder takes no more
    environment = {**ENVIRONMENT, "PYTHONPATH": str(CONFIGS.parents[1])}
    ended = subprocess.run(
        [sys.executable, "-m", programs[words[0]], *words[1:]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANGS,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "processes: 2 (distributed)" in ended.stdout
    assert (tmp_path / words[words.index("--output_dir") + 1] / "adapter_model.safetensors").is_file()


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
    assert first.stdout.count("retraining: on all ") == (config == "cpu_2")
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
    failed = run(launched("cpu_2", script, *words[words.index("train") + 1 :]))
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if line.startswith("hf-lora: ")]
    assert len(lines) == 1 and "another training set in process 1" in lines[0]


def test_sigterm_to_the_launcher_saves_one_checkpoint_of_all(folder, tmp_path):
    output = tmp_path / "a"
    process = subprocess.Popen(
        command(folder, output, "--save_total_limit", "1", steps=100000),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        assert until(lambda: checkpoints(output) or process.poll() is not None, pause=0.2)
        # As Slurm does: every process of the job gets it.
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=HANGS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    saved = checkpoints(output)
    assert len(saved) == 1 and problem(saved[0]) is None, errors[-2000:]
    assert errors.count(f"SIGTERM: saved {saved[0].name} in ") == 1
    assert process.returncode != 0
    state = json.loads((saved[0] / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 100000
