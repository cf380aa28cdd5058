from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import write_texts
from helpers_recipe import command

from hf_lora.cli import main as cli

GRIDS = {"sweep": ["--ranks", "2,1", "--projections", "qv"], "curve": ["--shots", "4,10"]}


@pytest.fixture
def argv(tiny_bert_dir: Path, tmp_path: Path) -> list[str]:
    """The arguments of quick runs, without the directory of their output."""
    write_texts(tmp_path / "texts.csv", 48)
    flags = command(tiny_bert_dir, tmp_path, "--train_file", tmp_path / "texts.csv", "--seed", 7)
    place = flags.index("--output_dir")
    return [*flags[:place], *flags[place + 2 :]]


@pytest.mark.parametrize("name", GRIDS)
def test_one_command_from_texts_to_a_table(
    name: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    line = [name, *argv, *GRIDS[name], "--seeds", "1", "--output_dir", str(output), "--max_steps", "2"]
    assert cli.main(line) == 0
    captured = capsys.readouterr()
    assert f"written: {output}/{name}.json and {output}/{name}.png" in captured.out
    assert re.search(
        r"2 of 2: (rank-1-qv|shots-10), seed 7: accuracy \d\.\d{4}, \d+\.\d s; 0:00:00 left", captured.err
    )
    if name == "sweep":
        assert re.search(r" 2 │ qv +│ +512 │ +578 │ +\d\.\d{4} │", captured.out)
        assert re.search(r"^smallest within noise of it: rank 1 on qv: .* 322 trainable", captured.out, re.M)
        assert f"its adapter of the first seed: {output}/rank-1-qv/seed-7" in captured.out
    else:
        assert "of texts.csv, seed 7" not in captured.out and "texts.csv, seed 7" in captured.out
    logs = [path.read_text() for path in output.glob("*/seed-7/train.log")]
    assert len(logs) == 2 and all("; labels " in log for log in logs)
    # What is done is used; nothing but the object is on the standard output.
    assert cli.main([*line, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((output / f"{name}.json").read_text())
    assert "2 of 2 runs are done already" in captured.err
    assert cli.main([*line, "--json", "--quiet", "True", "--disable_tqdm", "False"]) == 0
    assert "runs are done" not in capsys.readouterr().err


def test_dry_run_lists_the_runs_and_leaves_nothing(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {}
    for name, grid in GRIDS.items():
        line = [name, *argv, *grid, "--seeds", "2", "--output_dir", str(tmp_path / "new"), "--dry_run"]
        assert cli.main([*line, "--json"]) == 0
        rows[name] = json.loads(capsys.readouterr().out)
    assert [row.pop("directory") for row in rows["sweep"]] == [
        f"{tmp_path}/new/rank-{rank}-qv/seed-{seed}" for rank in (2, 1) for seed in (7, 8)
    ]
    assert rows["sweep"] == [
        {"rank": rank, "projections": "qv", "seed": seed, "LoRA parameters": 256 * rank, "state": "to do"}
        for rank in (2, 1)
        for seed in (7, 8)
    ]
    assert rows["curve"] == [
        {
            "of each label": shots,
            "seed": seed,
            "state": "to do",
            "directory": f"{tmp_path}/new/shots-{shots}/seed-{seed}",
        }
        for shots in ("4", "10")
        for seed in (7, 8)
    ]
    assert not (tmp_path / "new").exists()


MISTAKES = {
    "sweep --ranks 1,,2": ["ranks", "'1,,2'", "1,2,4,8"],
    "sweep --ranks 0,1": ["ranks", "'0,1'", "above 0"],
    "sweep --ranks 4,x": ["ranks", "'4,x'"],
    "sweep --ranks all": ["ranks", "'all'"],
    "sweep --projections q,w": ["'w'", "qkvo"],
    "sweep --seeds 0": ["seeds", "got 0"],
    "sweep --metric speed": ["metric", "'speed'", "f1_macro"],
    "sweep --lora_rank 8": ["--lora_rank", "--ranks"],
    "sweep --lora-rank=4": ["--lora_rank", "--ranks"],
    "sweep --lora_target_modules query": ["--lora_target_modules", "--projections"],
    "sweep --resume_from_checkpoint": ["--resume_from_checkpoint", "a sweep goes on by itself"],
    "sweep --push_to_hub": ["--push_to_hub", "hf-lora push"],
    "sweep --accelerate_config cpu_2": ["--accelerate_config", "one process"],
    "sweep --lora_rnk 1": ["lora_rnk", "did you mean '--lora_rank'"],
    "sweep --rnks 1": ["unknown option --rnks", "did you mean '--ranks'"],
    "sweep --model_name_or_path @tmp/nobase": ["nobase"],
    "curve --shots 8,,32": ["shots", "'8,,32'", "8,32,128,all"],
    "curve --shots 8,most": ["shots", "'8,most'", "'all'"],
    "curve --shots 1,8": ["few_shot 1 leaves nothing to hold out", "2 or more"],
    "curve --plot curve.doc": ["plot is no picture", "'curve.doc'", ".png"],
    "curve --few_shot 8": ["--few_shot is not for a curve", "--shots"],
    "curve --max_train_samples 8": ["--max_train_samples is not for a curve", "--shots"],
    "curve --resume_from_checkpoint": ["--resume_from_checkpoint", "a curve goes on by itself"],
    "curve --model_name_or_path @tmp/nobase": ["nobase"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake_is_told_in_one_line(
    line: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *flags = line.replace("@tmp", str(tmp_path)).split()
    assert cli.main([name, *argv, "--output_dir", str(tmp_path / "new"), *flags]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("hf-lora: ") and "Traceback" not in captured.err
    assert [words for words in MISTAKES[line] if words not in message] == []
    assert not list(tmp_path.glob("new/*"))


def test_a_yaml_file_holds_the_options_of_the_runs(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    pairs = zip(argv[::2], argv[1::2], strict=True)
    config.write_text("".join(f"{name[2:]}: {value}\n" for name, value in pairs) + "quiet: true\n")
    line = ["sweep", str(config), *GRIDS["sweep"], "--seeds", "2", "--output_dir", str(tmp_path / "new")]
    assert cli.main([*line, "--dry_run", "--json"]) == 0
    assert [row["seed"] for row in json.loads(capsys.readouterr().out)] == [7, 8, 7, 8]
    config.write_text(config.read_text() + "dry_run: true\n")
    assert cli.main(line) == 0
    assert "4 runs" in capsys.readouterr().out and not (tmp_path / "new").exists()
    config.write_text(config.read_text() + "lora_rank: 3\n")
    assert cli.main(line) == 2
    assert "--lora_rank is not for a sweep; use --ranks" in capsys.readouterr().err


@pytest.mark.parametrize("name", GRIDS)
def test_help_says_where_the_other_arguments_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    assert "hf-lora train --help" in " ".join(capsys.readouterr().out.split())
