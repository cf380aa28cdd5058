"""Runs snippets and commands of documents, one after the other in one process: imports are paid once.

`python document_runner.py TASKS RESULTS` in the folder they are to run in. TASKS is a JSON list of
`{"id", "kind", "namespace", "code" | "argv"}`; RESULTS gets `{id: "" or what went wrong}`.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

# Commands that refuse a directory that is there.
WRITE_NEW = ("merge", "resize", "add", "extract", "export")
# What makes a training of `hf_lora.finetune` take a second: by option its value, the argument that it may be given in
# as a part, and its name there.
TINY = {
    "max_seq_length": (32, "data", "max_length"),
    "overwrite_output_dir": (True, "options", "overwrite_output_dir"),
    "num_train_epochs": (1, "args", "num_train_epochs"),
    "use_cpu": (True, "args", "use_cpu"),
}


def make_finetune_tiny() -> None:
    """Let `from hf_lora import finetune` give one that is told to be quick, whatever the document says."""
    import hf_lora

    finetune = hf_lora.finetune

    def quick(*args: Any, **settings: Any) -> Any:
        for option, (value, argument, field) in TINY.items():
            if argument not in settings:
                settings[option] = value
            elif argument != "args":  # training arguments that are given as one object hold for all
                settings[argument] = replace(settings[argument], **{field: value})
        return finetune(*args, **settings)

    hf_lora.finetune = quick


def run_python(task: dict[str, Any], namespaces: dict[str, dict[str, Any]]) -> None:
    """A block of Python in its document's namespace, or in a new one."""
    names = (
        namespaces.setdefault(task["namespace"], new_namespace()) if task["namespace"] else new_namespace()
    )
    exec(compile(task["code"], task["id"], "exec"), names)


def run_command(task: dict[str, Any], _: Any) -> None:
    """A command line of `hf-lora`, which has to end with 0."""
    from hf_lora.cli import main as cli

    argv = task["argv"]
    if argv[0] in WRITE_NEW:
        shutil.rmtree(argv[argv.index("--output_dir") + 1], ignore_errors=True)
    code = cli.main(argv)
    assert code == 0, f"exit code {code}"


def check_flags(task: dict[str, Any], _: Any) -> None:
    """The script, or the subcommand of `hf-lora`, exists and its --help has every flag that the document gives."""
    first, flags = task["argv"][0], [word for word in task["argv"][1:] if word.startswith("--")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        if first.endswith(".py"):
            sys.argv = [first, "--help"]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
        else:
            from hf_lora.cli import main as cli

            cli.main([first, "--help"])
    shown = out.getvalue().replace("=", " ").replace(",", " ").replace("[", " ").replace("]", " ").split()
    assert "usage:" in shown, f"{first} --help printed no usage"
    assert set(flags) <= set(shown), f"{first} --help does not know {sorted(set(flags) - set(shown))}"


def check_launch(task: dict[str, Any], _: Any) -> None:
    """`hf-lora train` with flags for accelerate: both parts are understood, and nothing is started."""
    from hf_lora.cli.main import take_launch_options
    from hf_lora.cli.train import parse_settings

    launch, argv = take_launch_options(task["argv"])
    assert launch is not None and launch.config.is_file()
    parse_settings([*argv, "--train_file", "train.csv", "--output_dir", "launched"])


KINDS = {"python": run_python, "hf-lora": run_command, "flags": check_flags, "launch": check_launch}


def new_namespace() -> dict[str, Any]:
    """What a block starts with: its name, and the data set that stands for `train_dataset=...`."""
    return {"__name__": "document", "small_dataset": small_dataset}


def small_dataset(tokenizer: Any) -> Any:
    """Four examples of two labels."""
    from datasets import Dataset

    return Dataset.from_dict({**tokenizer(["good film", "bad meal"] * 2), "labels": [1, 0] * 2})


def main(tasks: Path, results: Path) -> None:
    """Run every task; one that fails does not keep the others from running."""
    make_finetune_tiny()
    namespaces: dict[str, dict[str, Any]] = {}
    found = {}
    for task in json.loads(tasks.read_text()):
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                KINDS[task["kind"]](task, namespaces)
            found[task["id"]] = ""
        except BaseException:
            found[task["id"]] = f"{traceback.format_exc()}\n{out.getvalue()[-2000:]}"
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
