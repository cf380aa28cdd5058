"""`--accelerate_config`: names, files, what goes to the launcher, and configurations that accelerate understands."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_lora.cli.main import Launch, launch_names, main, relaunched, take_launch_options

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ["cpu_2", "cpu_2_fsdp2", "fsdp2", "multi_gpu", "multi_node", "single_gpu", "zero2", "zero3"]


def test_the_configurations_have_short_names():
    assert launch_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accelerates_own_loader_reads_every_configuration(name):
    config = load_config_from_file(str(SCRIPTS / "accelerate" / f"{name}.yaml"))
    assert config.num_processes >= 1 and config.mixed_precision == "no"
    expected = {
        "fsdp2": "FSDP",
        "cpu_2_fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
        "single_gpu": "NO",
    }
    assert config.distributed_type.value == expected.get(name, "MULTI_GPU")
    assert config.use_cpu is name.startswith("cpu")
    if "fsdp" in name:
        assert config.fsdp_config["fsdp_version"] == 2
    if "zero" in name:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_command_line_is_split_between_launcher_and_run(tmp_path):
    words = ["a.yaml", "--accelerate_config", "cpu_2", "--num_processes", "3", "--learning_rate", "0.1"]
    launch, rest = take_launch_options(words)
    assert rest == ["a.yaml", "--learning_rate", "0.1"]
    assert launch == Launch(SCRIPTS / "accelerate" / "cpu_2.yaml", ("--num_processes", "3"))
    own = tmp_path / "own.yaml"
    own.write_text("")
    assert take_launch_options(["--accelerate_config", str(own)])[0] == Launch(own, ())
    assert take_launch_options(["--learning_rate", "0.1"]) == (None, ["--learning_rate", "0.1"])


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert main(["train", "--accelerate_config", "gpu"]) == 2
    message = capsys.readouterr().err
    assert "got 'gpu'" in message and "multi_gpu" in message and message.count("\n") == 1


def test_flags_of_the_launcher_need_a_configuration(capsys):
    assert main(["train", "--num_processes", "2"]) == 2
    assert "--num_processes is for the launcher; got no --accelerate_config" in capsys.readouterr().err


def test_a_launched_process_does_not_launch_again(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="starts processes; got it in one that a launcher has started"):
        relaunched(Launch(SCRIPTS / "accelerate" / "cpu_2.yaml", ()), [])


@pytest.mark.parametrize("name", ["slurm.sbatch"])
def test_the_slurm_script_is_valid_shell_and_names_files_that_exist(name):
    script = SCRIPTS / "accelerate" / name
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for word in script.read_text().split():
        if word.startswith("scripts/") and word.endswith((".yaml", ".py")):
            assert (SCRIPTS.parent / word).is_file(), word
    assert os.access(script, os.R_OK)
