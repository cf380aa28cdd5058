"""The command as a whole: help, exit codes, and mistakes told in one line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_commands import call

from hf_lora.cli import main as cli
from hf_lora.models.loading import PRECISIONS
from hf_lora.serving.encoding import CPU_TOKENS, TOKENS
from hf_lora.version import __version__

COMMANDS = (
    *("train", "evaluate", "predict", "merge", "info", "targets"),
    *("resize", "add", "extract", "push", "export", "inspect", "report", "sweep", "curve"),
)
HELP = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "sklearn",
    "evaluate",
    "rich",
    "yaml",
    "matplotlib",
    "jinja2",
    "huggingface_hub",
}


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_help_exits_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"hf-lora {__version__}" if "--version" in argv else "usage: hf-lora")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    call("--help")
    out = capsys.readouterr().out
    assert [command for command in COMMANDS if not re.search(rf"^    {command} ", out, re.MULTILINE)] == []


def test_train_without_arguments_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train") == 0
    without = capsys.readouterr().out
    assert call("train", "-h") == 0
    assert capsys.readouterr().out == without


def test_help_imports_nothing_heavy() -> None:
    # The same interpreter prints every help, so that one process shows it for all of them.
    code = f"""
import sys
from hf_lora.cli.main import main
for argv in {HELP!r}:
    try:
        assert main(argv) == 0, argv
    except SystemExit as exit:
        assert exit.code == 0, argv
    print("loaded:", *sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert loaded == ["loaded:"] * len(HELP)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_the_flags_of_speed_are_those_of_the_library(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [command, "--adapter", "x"]
    assert cli.make_parser().parse_args(given).precision == PRECISIONS[0] == "auto"
    for precision in PRECISIONS:
        options = cli.make_parser().parse_args([*given, "--precision", precision])
        assert (options.precision, options.batch_size) == (precision, None)
    assert call(command, "--adapter", "x", "--precision", "fp16") == 2
    assert "fp16" in capsys.readouterr().err
    call(command, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"as many as make {CPU_TOKENS:,} tokens; {TOKENS:,} on a GPU" in shown


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["bogus"],
        ["predict"],
        ["info", "--bogus"],
        ["merge", "--adapter", "x"],
        ["evaluate", "--adapter", "x", "--batch_size", "many"],
    ],
    ids=" ".join,
)
def test_unusable_command_line_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("hf-lora: ") and line.endswith(" --help lists the options")


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("predct text --adapter x", "predict"),
        ("predict text --adapter x --precision bf1", "bf16"),
        ("predict text --adapter x --txt_column a", "--text_column"),
        ("predict --adapter @adapter --input_file @csv --text_column txt", "text"),
        ("predict --adapter @adapter --input_file @csv --output_file out.cvs", ".csv"),
        ("evaluate --adapter @adapter --test_file @csv --label_column lable", "label"),
        ("train --accelerate_config cpu2", "cpu_2"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_nearest(
    line: str,
    near: str,
    adapter_dir: Path,
    tiny_csv: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = line.replace("@adapter", str(adapter_dir)).replace("@csv", str(tiny_csv))
    assert call(*line.split()) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {near!r}?\n")


def test_a_missing_flag_of_train_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--model_name_or_path", "m") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-lora: the following arguments are required: --output_dir")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on standard error; progress bars, which end in a carriage return, are not counted."""
    err = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]
    lines = [
        line for line in lines if not line.startswith("warning: validation: 10 of 10 examples have a text")
    ]
    assert "Traceback" not in err
    assert len(lines) == 1, lines
    assert lines[0].startswith("hf-lora: ")
    return lines[0]


TRAIN = "train --model_name_or_path @base --use_cpu --max_seq_length 32 --output_dir @tmp/new"
DATA = f"{TRAIN} --train_file @csv"
# Command lines with a mistake in them, and what the error has to mention.
MISTAKES = {
    TRAIN: ["no data given", "train_file"],
    f"{TRAIN} --train_file @tmp/none.csv": ["none.csv", "does not exist"],
    f"{DATA} --text_column body": ["'body'", "'text'"],
    f"{DATA} --label_column topic": ["'topic'", "'label'"],
    f"{DATA} --problem_type ranking": ["problem_type", "'ranking'", "regression"],
    f"{DATA} --validation_fraction 1.5": ["validation_fraction", "1.5"],
    f"{DATA} --encoding utf-9": ["encoding", "'utf-9'"],
    f"{DATA} --lora_projections xyz": ["'xyz'", "qkvo"],
    f"{DATA} --lora_rank -1": ["rank", "got -1"],
    f"{DATA} --lora_rank 0 --head_init random": ["nothing would be trained", "head_init=probe"],
    f"{DATA} --head_init zero": ["head_init", "'zero'", "auto, probe, random"],
    f"{DATA} --pooling max": ["pooling", "'max'", "mean, cls"],
    f"{DATA} --few_shot 0": ["few_shot is 0"],
    f"{DATA} --lora_dropout 1": ["dropout", "got 1"],
    f"{DATA} --lora_init zeros": ["'zeros'", "kaiming"],
    f"{DATA} --lora_target_modules q_proj": ["'q_proj'", "query"],
    f"{DATA} --lora_target_modules qury": ["'qury'", "did you mean 'query'?"],
    f"{DATA} --lora_layers 2": ["layers", "[2]", "-2 to 1"],
    f"{DATA} --lora_rank_pattern {{8": ["lora_rank_pattern", "JSON", "{8"],
    f"{DATA} --lora_alpha_pattern [8]": ["lora_alpha_pattern", "JSON object", "[8]"],
    f"{DATA} --class_weights 1,2,3": ["class_weights", "1,2,3", "2 numbers"],
    f"{DATA} --output_dir @used": ["in use", "overwrite_output_dir", "resume_from_checkpoint"],
    f"{DATA} --bogus 1": ["--bogus"],
    f"{DATA} --max_seq_length 65": ["max_length is 65", "64"],
    f"{DATA} --model_name_or_path @tmp/nobase": ["nobase"],
    f"{DATA} --resume_from_checkpoint @tmp/checkpoint-7": ["checkpoint-7"],
    "train @tmp/none.yaml": ["none.yaml", "No such file"],
    "info --adapter @tmp/none": ["no such adapter", "none"],
    "info --adapter @broken": ["not an adapter directory", "adapter_model.safetensors is missing", "broken"],
    "predict text --adapter @broken": ["adapter_model.safetensors is missing"],
    "predict text --adapter org/adapter": ["no such adapter", "'org/adapter'", "cannot be reached"],
    "predict --adapter @adapter --input_file @tmp/no.csv": ["no.csv", "does not exist"],
    "predict --adapter @adapter --input_file @csv --text_column body": ["'body'", "'text'"],
    "predict --adapter @adapter --input_file @csv --encoding utf-9": ["encoding", "utf-9"],
    "predict --adapter @adapter --input_file @adapter/README.md": ["README.md"],
    "predict text --adapter @adapter --base @tmp/nobase": ["nobase"],
    "predict text --adapter @adapter --batch_size 0": ["batch_size"],
    "evaluate --adapter @adapter": ["no data given", "test_file"],
    "evaluate --adapter @adapter --test_file @tmp/no.csv": ["no.csv", "does not exist"],
    "evaluate --adapter @adapter --test_file @csv --label_column topic": ["'topic'", "'label'"],
    "merge --adapter @adapter --output_dir @used": ["output_dir exists", "used", "new directory"],
    "merge --adapter @broken --output_dir @tmp/new": ["adapter_model.safetensors is missing"],
    "targets --model_name_or_path @base --lora_projections qz": ["'qz'", "qkvo"],
    "targets --model_name_or_path @tmp/nobase": ["nobase"],
}


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake_is_told_in_one_line(
    line: str,
    tiny_bert_dir: Path,
    adapter_dir: Path,
    tiny_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    (tmp_path / "used").mkdir()
    shutil.copy(adapter_dir / "adapter_config.json", tmp_path / "used")
    places = {
        "@base": tiny_bert_dir,
        "@adapter": adapter_dir,
        "@csv": tiny_csv,
        "@broken": tmp_path / "broken",
        "@used": tmp_path / "used",
        "@tmp": tmp_path,
    }
    argv = []
    for part in line.split():
        for token, place in places.items():
            part = part.replace(token, str(place))
        argv.append(part)
    before = files_below(tmp_path)
    assert call(*argv) == 2
    message = one_line(capsys)
    assert [words for words in MISTAKES[line] if words not in message] == []
    assert files_below(tmp_path) == before


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_LORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such adapter"):
        cli.main(["info", "--adapter", str(tmp_path / "none")])


def raising(error: type[BaseException]) -> Callable[..., None]:
    def read(*_: object) -> None:
        raise error("bug")

    return read


def test_bug_is_not_taken_for_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lora.cli.inspect._read", raising(KeyError))
    with pytest.raises(KeyError, match="bug"):
        cli.main(["info", "--adapter", "x"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hf_lora.cli.inspect._read", raising(KeyboardInterrupt))
    assert cli.main(["info", "--adapter", "x"]) == 130
    assert one_line(capsys) == "hf-lora: interrupted"
