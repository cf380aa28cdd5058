"""Every Python block and every command of README, the site, cards and notebook is executed.

They run in a folder of their own, where the names in them mean something tiny: the Hub's cache holds tiny random
models under the names of the real ones, `runs/demo` is an adapter of five labels, `train.csv` has 40 short texts.
What cannot run is checked in another way, and stands in a table here with the reason.
README and quickstarts run in the fast half of the tests, the other pages in the slow one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MINILM, WORDS, tiny_tokenizer
from transformers import AutoConfig, AutoModel

from hf_lora.recipe.options import option_names

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
FAST = [ROOT / "README.md", *sorted((ROOT / "docs" / "quickstart").glob("*.md"))]
SLOW = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path not in FAST),
    *sorted((ROOT / "model_cards").glob("*.md")),
]
DOCUMENTS = [*FAST, *SLOW]
RUNNER = Path(__file__).parent / "document_runner.py"
# Documents whose blocks go on from each other, as their text says; elsewhere each block stands for itself.
CONTINUED = {
    "docs/guides/from_peft.md",
    "docs/guides/many_classifiers.md",
    "docs/guides/multi_label.md",
    "docs/guides/regression.md",
    "docs/guides/sentence_pairs.md",
    "docs/quickstart/python.md",
}
NEWS = ("business", "entertainment", "politics", "sports", "tech")
# Tiny models in the Hub's cache under the names that the documents use.
MODELS = {MINILM: "bert", "roberta-base": "roberta"}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "vocab_size": 64,
    "pad_token_id": 0,
}

# Placeholders in Python blocks, and what stands for them.
PYTHON_PLACEHOLDERS = {
    '"<this repository or directory>"': '"runs/demo"',
    '"me/mood@v2"': '"runs/other"',
    '"org/peft-adapter"': '"runs/bare"',
    '"org/finetuned"': '"merged_base"',
    "train_dataset=...": "train_dataset=small_dataset(tokenizer)",
}
# Words of command lines, and what stands for them; None: the word is left out.
WORDS_FOR = {
    "...": None,  # "and so on"
    "M": MINILM,
    "M2": "merged_base",  # what the set-up has merged
    "DIR": ".",
}
# Flags added at the end of a command, where they override what the document says, so that it takes seconds.
_TINY = "--num_train_epochs 1 --max_seq_length 32 --use_cpu True --disable_tqdm True --overwrite_output_dir"
ADDED = {
    "train": _TINY,
    "sweep": f"{_TINY} --ranks 1,2 --projections qv --seeds 1",
    "curve": f"{_TINY} --shots 4,8 --seeds 1",
}


@dataclass(frozen=True)
class Rule:
    """How commands that begin with some words are dealt with.

    kind: "hf-lora" runs them, the others check them: "flags" (exists, and --help knows the flags), "launch" (both
        parts parse), "shell" (a script of valid syntax), "install" (the project and the extra exist), "tool" (it is
        in .ci/run).
    why: why they are not run.
    """

    begins: str
    kind: str
    why: str = ""


# The first rule whose words a command begins with holds.
RULES = (
    Rule("hf-lora train --accelerate_config", "launch", "starts processes on GPUs; test_distributed runs it"),
    Rule("hf-lora push", "flags", "needs the Hub; the tests of pushing have one on the loopback"),
    Rule("hf-lora", "hf-lora"),
    Rule("accelerate launch --config_file", "flags", "starts processes on GPUs; test_distributed runs it"),
    Rule("torchrun --nproc_per_node 2", "flags", "starts processes; test_distributed runs it"),
    Rule("python scripts/benchmarks/", "flags", "minutes of measuring; tests/scripts runs parts"),
    Rule("python scripts/mnist_mlp.py", "flags", "minutes; test_mnist_reference runs it"),
    Rule("bash scripts/", "shell", "makes an environment, and trains or tests for minutes"),
    Rule("pip install", "install", "changes the environment that the tests run in"),
    Rule(".venv/bin/", "tool", ".ci/run runs it"),
)


@dataclass(frozen=True)
class Snippet:
    """A Python block or one command line of a document."""

    document: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.document}:{self.line}"


def snippets(name: str, text: str) -> Iterator[Snippet]:
    """The blocks and command lines of a document: fenced, or indented by four spaces after an empty line.

    Directives of MyST, such as a table of contents, are no snippets.
    """
    body = re.sub(r"\A---\n.*?\n---\n", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    lines = body.split("\n")
    index = 0
    while index < len(lines):
        fence = re.match(r"(```+)(\{?\w*)", lines[index])
        start = index + 1
        if fence:
            end = next(i for i in range(start, len(lines)) if lines[i] == fence.group(1))
            if not fence.group(2).startswith("{"):
                yield from _block(name, start, fence.group(2), lines[start:end])
            index = end + 1
        elif lines[index].startswith("    ") and (index == 0 or not lines[index - 1].strip()):
            end = index
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            yield from _block(name, index, "bash", [line[4:] for line in lines[index:end]])
            index = end
        else:
            index += 1


def _block(name: str, start: int, language: str, lines: list[str]) -> Iterator[Snippet]:
    if language not in ("bash", "sh"):
        yield Snippet(name, start + 1, language, "\n".join(lines) + "\n")
        return
    first, words = start, ""
    for number, line in enumerate(lines, start):
        first = first if words else number
        words += line.removesuffix("\\")
        if not line.endswith("\\") and words.strip():
            yield Snippet(name, first + 1, "bash", words)
            words = ""


def rule_for(command: list[str]) -> Rule | None:
    """The rule that holds for a command, if any."""
    return next((rule for rule in RULES if " ".join(command).startswith(rule.begins)), None)


def words_of(text: str) -> list[str]:
    """The words of a command line without its comment, placeholders replaced."""
    words = (WORDS_FOR.get(word, word) for word in shlex.split(text, comments=True))
    return [word for word in words if word is not None]


def task_of(snippet: Snippet) -> dict[str, Any] | None:
    """What the runner is to do for a snippet; None for what is checked here, without running anything."""
    if snippet.language not in ("python", "bash"):
        return None
    if snippet.language == "python":
        code = snippet.text
        if snippet.document.startswith("model_cards/"):
            code = code.replace("runs/demo", "runs/native")  # the card's adapter has the base's own head
        for placeholder, value in PYTHON_PLACEHOLDERS.items():
            code = code.replace(placeholder, value)
        namespace = snippet.document if snippet.document in CONTINUED else ""
        return {"id": snippet.id, "kind": "python", "namespace": namespace, "code": code}
    words = words_of(snippet.text)
    rule = rule_for(words)
    if rule is None or rule.kind in ("shell", "install", "tool"):
        return None
    if words[0] == "hf-lora":
        argv = words[1:] + (shlex.split(ADDED.get(words[1], "")) if rule.kind == "hf-lora" else [])
        argv = argv[1:] if rule.kind == "launch" else argv
    else:
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        argv = [str(ROOT / words[script]), *words[script + 1 :]]
        # `scripts/train.py` has the flags of `hf-lora train`, whose own help is made without transformers.
        argv = ["train", *argv[1:]] if words[script] == "scripts/train.py" else argv
    return {"id": snippet.id, "kind": rule.kind, "argv": argv}


def snippets_of(documents: list[Path]) -> list[Snippet]:
    """The snippets of all the documents, in order."""
    return [s for path in documents for s in snippets(path.relative_to(ROOT).as_posix(), path.read_text())]


QUICK, OTHERS = snippets_of(FAST), snippets_of(SLOW)
SNIPPETS = [*QUICK, *OTHERS]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the snippets run in, with the data that they name."""
    folder = tmp_path_factory.mktemp("documents")
    for name, model_type in MODELS.items():
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0123456789" * 4)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(snapshot.name)
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(model_type, **_SIZES)).save_pretrained(snapshot)
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 128
        tokenizer.save_pretrained(snapshot)
        if name.startswith("sentence-transformers/"):
            (snapshot / "1_Pooling").mkdir()
            pooling = {"word_embedding_dimension": _SIZES["hidden_size"], "pooling_mode_mean_tokens": True}
            (snapshot / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    write_data(folder)
    (config,) = [s.text for s in QUICK if s.language == "yaml"]
    (folder / "config.yaml").write_text(config)
    return folder


def write_data(folder: Path) -> None:
    """The data files that the documents name: short texts of few words."""

    def write(name: str, columns: str, rows: list[tuple[str, ...]]) -> None:
        with (folder / name).open("w", newline="") as stream:
            csv.writer(stream).writerows([columns.split(), *rows, *rows])

    texts = [f"the {WORDS[5 + row % 5]} was {WORDS[15 + row]}" for row in range(20)]
    news = [(text, NEWS[row % 5]) for row, text in enumerate(texts)]
    for name in ("train.csv", "test.csv", "validation.csv", "few.csv"):
        write(name, "text label", news[: 20 if name == "train.csv" else 10])
    write("mail.csv", "body folder", news)
    content = "".join(f"{text};{label}\n" for text, label in [("text", "label"), *news, *news])
    (folder / "semicolons.csv").write_text(content)
    bits = [(text, str(row % 2), str(row % 3 // 2), str(row % 5 // 4)) for row, text in enumerate(texts)]
    write("columns.csv", "text delivery damage billing", bits)
    both = [(text, "|".join(NEWS[row % 3 : row % 3 + 1 + row % 2])) for row, text in enumerate(texts)]
    write("tickets.csv", "text label", both)
    lines = [json.dumps({"text": text, "label": labels.split("|")}) for text, labels in both]
    (folder / "tickets.jsonl").write_text("\n".join(lines * 2))
    write("ratings.csv", "text label", [(text, f"{row / 4}") for row, text in enumerate(texts)])
    write("stars.csv", "text label", [(text, f"{row % 5}") for row, text in enumerate(texts)])
    pairs = [(text, texts[-1 - row], ("same", "different")[row % 2]) for row, text in enumerate(texts)]
    write("pairs.csv", "sentence1 sentence2 label", pairs)
    write("questions.csv", "first second label", pairs)


def in_workplace(workplace: Path, argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python there, with the Hub's cache of that place and without a network."""
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    values = {
        **os.environ,
        "HF_HUB_CACHE": str(workplace / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MPLBACKEND": "agg",
    }
    return subprocess.run(
        [sys.executable, *argv],
        cwd=workplace,
        env={**values, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_tasks(workplace: Path, name: str, tasks: list[dict[str, Any]]) -> dict[str, str]:
    """What went wrong with each task: "" for nothing."""
    (workplace / f"{name}.json").write_text(json.dumps(tasks))
    run = in_workplace(workplace, [str(RUNNER), f"{name}.json", f"{name}_results.json"])
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, str] = json.loads((workplace / f"{name}_results.json").read_text())
    return found


def tasks_of(some: list[Snippet]) -> list[dict[str, Any]]:
    """What the runner is to do for these snippets."""
    return [task for task in map(task_of, some) if task is not None]


@pytest.fixture(scope="module")
def adapters(workplace: Path) -> Path:
    """The workplace with the adapters and the model that documents begin with."""
    train = f"train --model_name_or_path {MINILM} --train_file train.csv {_TINY} --output_dir runs/"
    commands = {
        "demo": f"{train}demo",
        "other": f"{train}other --seed 1",
        "native": f"{train}native --pooling native",
        "merged": "merge --adapter runs/native --output_dir merged_base",
    }
    tasks = [{"id": name, "kind": "hf-lora", "argv": line.split()} for name, line in commands.items()]
    found = run_tasks(workplace, "setup", [*tasks, *PROBES])
    assert [found[name] for name in commands] == [""] * len(commands)
    # As peft would have written it.
    shutil.copytree(workplace / "runs" / "native", workplace / "runs" / "bare")
    (workplace / "runs" / "bare" / "hf_lora.json").unlink()
    return workplace


@pytest.fixture(scope="module")
def quick_outcomes(adapters: Path) -> dict[str, str]:
    return run_tasks(adapters, "quick", tasks_of(QUICK))


@pytest.fixture(scope="module")
def outcomes(adapters: Path) -> dict[str, str]:
    return run_tasks(adapters, "others", tasks_of(OTHERS))


@pytest.mark.parametrize("snippet", QUICK, ids=lambda snippet: snippet.id)
def test_snippet_of_a_first_page(snippet: Snippet, quick_outcomes: dict[str, str]) -> None:
    check(snippet, quick_outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", OTHERS, ids=lambda snippet: snippet.id)
def test_snippet(snippet: Snippet, outcomes: dict[str, str]) -> None:
    check(snippet, outcomes)


def check(snippet: Snippet, outcomes: dict[str, str]) -> None:
    """Assert that a snippet ran, or that what it says is so."""
    if snippet.language == "python":
        assert outcomes[snippet.id] == ""
        return
    if snippet.language == "yaml":
        assert set(yaml.safe_load(snippet.text)) <= option_names() | {"quiet", "dry_run"}
        return
    if snippet.language == "json":
        json.loads(snippet.text)
        return
    if snippet.language == "text":
        return
    assert snippet.language == "bash", f"a block of {snippet.language!r}: say here what is to be done with it"
    words = words_of(snippet.text)
    rule = rule_for(words)
    assert rule is not None, (
        f"no rule for {snippet.text!r}: add one to RULES, with the reason if it cannot run"
    )
    assert rule.why or rule.kind == "hf-lora"
    if rule.kind == "shell":
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
    elif rule.kind == "install":
        check_install(words)
    elif rule.kind == "tool":
        assert words[0] in (ROOT / ".ci" / "run").read_text()
    else:
        assert outcomes[snippet.id] == ""
    for word in words[1:]:
        if word.startswith("scripts/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


def check_install(words: list[str]) -> None:
    """`pip install .` or `.[extra]`: the project is here and has the extra."""
    project = (ROOT / "pyproject.toml").read_text()
    target = re.fullmatch(r"\.\.?(?:\[(\w+)\])?", words[2])
    assert target, f"{words[2]!r} is not this project"
    assert target.group(1) is None or re.search(rf"^{target.group(1)} = \[", project, re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_extras_in_the_text_exist(path: Path) -> None:
    for extra in re.findall(r"pip install '?(\.\[\w+\])", path.read_text()):
        check_install(["pip", "install", extra])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for place in re.findall(r"\]\(([^)\s]+)\)", text):
        if place.startswith("#"):
            titles = [
                re.sub(r"[^\w -]", "", t).lower().replace(" ", "-")
                for t in re.findall(r"^#+ (.*)", text, re.M)
            ]
            assert place[1:] in titles, f"{path.name} has no section {place}"
        elif not place.startswith("http"):
            assert (path.parent / place).exists(), f"{place} does not exist"


def test_every_table_is_used() -> None:
    """An entry that no document needs any more says something untrue about them."""
    python = "".join(s.text for s in SNIPPETS if s.language == "python")
    commands = [shlex.split(s.text, comments=True) for s in SNIPPETS if s.language == "bash"]
    assert [word for word in WORDS_FOR if not any(word in words for words in commands)] == []
    used = {rule_for(words_of(" ".join(map(shlex.quote, words)))) for words in commands}
    assert [rule.begins for rule in RULES if rule not in used and rule.begins not in OPTIONAL] == []
    assert [text for text in PYTHON_PLACEHOLDERS if text not in python and text not in OPTIONAL] == []
    assert {path.relative_to(ROOT).as_posix() for path in DOCUMENTS} >= CONTINUED


# Entries for what a document may have, such as a card that was rendered for a repository.
OPTIONAL = {"hf-lora push", '"<this repository or directory>"'}


SAMPLE = """---
title: x
---

# Title

Text:

    hf-lora info --adapter a   # a comment
    hf-lora train --x 1 \\
        --y "two words"

```python
print(1)
```

```{toctree}
page
```

- a list
    that goes on
```sh
make it
```
"""


def test_blocks_and_commands_are_found_where_they_are() -> None:
    found = [(s.line, s.language, s.text.strip()) for s in snippets("sample.md", SAMPLE)]
    assert found == [
        (9, "bash", "hf-lora info --adapter a   # a comment"),
        (10, "bash", 'hf-lora train --x 1     --y "two words"'),
        (14, "python", "print(1)"),
        (24, "bash", "make it"),
    ]
    assert words_of(found[1][2]) == ["hf-lora", "train", "--x", "1", "--y", "two words"]
    assert rule_for(["make", "it"]) is None


# What the runner has to tell of, beside the documents' own snippets in one process.
PROBES: list[dict[str, Any]] = [
    {"id": "wrong", "kind": "python", "namespace": "", "code": "1 / 0"},
    {"id": "mistake", "kind": "hf-lora", "argv": ["info", "--adapter", "nowhere"]},
    {"id": "flag", "kind": "flags", "argv": ["info", "--no_such_flag"]},
    {"id": "exit", "kind": "python", "namespace": "", "code": "raise SystemExit(1)"},
    {"id": "first", "kind": "python", "namespace": "a.md", "code": "number = 3"},
    {"id": "second", "kind": "python", "namespace": "a.md", "code": "assert number == 3"},
    {"id": "alone", "kind": "python", "namespace": "", "code": "number"},
]


def test_the_runner_tells_what_fails(adapters: Path) -> None:
    outcomes = json.loads((adapters / "setup_results.json").read_text())
    found = {probe["id"]: outcomes[probe["id"]] for probe in PROBES}
    assert {name for name, trouble in found.items() if not trouble} == {"first", "second"}
    assert "ZeroDivisionError" in found["wrong"] and "no such adapter" in found["mistake"]
    assert "--no_such_flag" in found["flag"] and "NameError" in found["alone"]
    assert "SystemExit" in found["exit"]


def cells(kind: str) -> list[str]:
    """The sources of the notebook's cells of a kind, in order."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_has_the_form_of_one_and_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (install,) = [line for cell in cells("code") for line in cell.splitlines() if line.startswith("%")]
    check_install([word for word in shlex.split(install.removeprefix("%")) if word != "--quiet"])
    for place in re.findall(r"\]\(([^)\s]+)\)", "".join(cells("markdown"))):
        assert (NOTEBOOK.parent / place).exists()


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(minilm: str, workplace: Path, tmp_path: Path) -> None:
    # As a kernel does, one cell after the other in one namespace; magics are for an installation only.
    program = ["namespace = {'__name__': 'notebook'}"]
    for number, cell in enumerate(cells("code")):
        plain = "\n".join("" if line.startswith("%") else line for line in cell.splitlines())
        program.append(f"exec(compile({plain!r}, 'cell {number}', 'exec'), namespace)")
    program.append(
        "import json; n = namespace; v = n['result'].validation; print(json.dumps([v.accuracy, "
        "v.disabled.accuracy, n['difference'], type(n['classifier'].model).__name__]))"
    )
    path = tmp_path / "notebook.py"
    path.write_text("\n".join(program))
    # The real encoder from the package: the Hub's cache is empty.
    run = in_workplace(workplace, [str(path)], HF_HUB_CACHE=str(tmp_path / "empty"), TMPDIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    accuracy, disabled, difference, name = json.loads(run.stdout.splitlines()[-1])
    assert accuracy > 0.8 and accuracy > disabled
    assert difference < 1e-4 and name == "BertForSequenceClassification"
    assert "epoch 2: " in run.stdout and "smaller" in run.stdout
