"""Files of others: any contents give a correct load or a ValueError in one line, in bounded memory and time."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import randomize, tiny_classifier
from helpers_fuzz import KINDS, Case, Trial, good_adapter

from hf_lora import LoRAConfig, TextClassifier, inject_lora, load_adapter, remove_lora, save_adapter
from hf_lora._files import MAX_HEADER_BYTES, MAX_JSON_BYTES, read_bytes
from hf_lora._text import Budget, printable
from hf_lora.adapters.card import RunSummary, render_card
from hf_lora.adapters.directory import CONFIG, TENSORS, AdapterFiles, read_adapter
from hf_lora.adapters.hub import adapter_contents
from hf_lora.adapters.info import FILE, AdapterInfo
from hf_lora.adapters.values import Adapter
from hf_lora.cli.main import main
from hf_lora.insight.report import describe
from hf_lora.lora.inject import ParameterCount, is_injected

PLAIN = tiny_classifier()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an adapter that loads, its sidecar without digests, so that changes are not seen by them."""
    model = tiny_classifier()
    inject_lora(model, LoRAConfig(rank=4, alpha=8, rank_pattern={"query": 2}))
    randomize(model)
    directory = save_adapter(model, tmp_path_factory.mktemp("good") / "adapter")
    info = json.loads((directory / FILE).read_text())
    info["sha256"] = {}
    (directory / FILE).write_text(json.dumps(info))
    return {name: (directory / name).read_bytes() for name in (TENSORS, CONFIG, FILE)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def attempt(folder: Path, files: dict[str, bytes]) -> str | None:
    """Load the files: the error's message, or None. Anything but a ValueError, and a slow one, fails the test."""
    for name in (TENSORS, CONFIG, FILE):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    before = {name: tensor.clone() for name, tensor in PLAIN.state_dict().items()}
    message = None
    try:
        load_adapter(PLAIN, folder)
    except ValueError as error:
        message = str(error)
        assert message and len(message) < 5000
    else:
        with torch.no_grad():
            PLAIN(input_ids=torch.tensor([[5, 6, 7]]))
    finally:
        if is_injected(PLAIN):
            assert message is None
            remove_lora(PLAIN)
            # The head came with the adapter, which is a correct load.
            PLAIN.load_state_dict(before)
    after = PLAIN.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return message


# The number of cases: HF_LORA_FUZZ_CASES=20000 tries more. Each is made from its number alone.
CASES = int(os.environ.get("HF_LORA_FUZZ_CASES", "2000"))
IN_A_PROCESS = 500


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, IN_A_PROCESS))
def test_hostile_directories_load_or_are_refused_in_one_line(first: int) -> None:
    # In a process of its own, whose memory and processor time are limited.
    script = Path(__file__).with_name("helpers_fuzz.py")
    command = [sys.executable, str(script), str(first), str(min(IN_A_PROCESS, CASES - first))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout[-5000:]}\n{run.stderr[-2000:]}"


@pytest.mark.slow
def test_some_hostile_directories_of_each_kind(tmp_path: Path) -> None:
    adapter, trial = good_adapter(tmp_path), Trial()
    assert trial.attempt(adapter) == [None] * 5
    outcomes = {}
    for number in range(2 * len(KINDS)):
        case = Case(number, adapter, tmp_path / str(number))
        outcomes.setdefault(case.kind, []).append(any(trial.attempt(case.folder)))
    assert outcomes.keys() == KINDS.keys()
    # Were all of one sort, the generators would try nothing.
    assert len(KINDS) / 2 < sum(map(any, outcomes.values())) < len(KINDS)


def test_a_case_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path)
    for number in range(len(KINDS)):
        first, again = (Case(number, adapter, tmp_path / f"{number}{part}").folder for part in "ab")
        sizes = [{path.name: path.lstat().st_size for path in made.iterdir()} for made in (first, again)]
        assert sizes[0] == sizes[1]


def test_the_good_adapter_loads(good: dict[str, bytes], folder: Path) -> None:
    assert attempt(folder, good) is None
    assert attempt(folder, {name: good[name] for name in (TENSORS, CONFIG)}) is None


@pytest.mark.parametrize("name", [CONFIG, FILE])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"r": 1' + b"0" * 10_000 + b"}", "not valid JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "too large"),
        (b"\xff\xfe", "JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_without_end(
    name: str, content: bytes, message: str, good: dict[str, bytes], folder: Path
) -> None:
    assert message in str(attempt(folder, {**good, name: content}))


def changed(good: dict[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
    return {**good, name: json.dumps({**json.loads(good[name]), **values}).encode()}


def test_a_rank_of_a_billion_is_refused_before_anything_is_made(good: dict[str, bytes], folder: Path) -> None:
    bare = {name: good[name] for name in (TENSORS, CONFIG)}
    lora = json.loads(good[FILE])["lora"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for files in (
        changed(bare, CONFIG, r=10**9, rank_pattern={}),
        changed(bare, CONFIG, rank_pattern={"query": 10**9}),
        changed(good, FILE, lora={**lora, "rank": 10**9, "rank_pattern": {}}),
    ):
        assert "another rank in its configuration than in its tensors" in str(attempt(folder, files))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000


def test_millions_of_labels_make_no_head(good: dict[str, bytes], folder: Path) -> None:
    labels = [f"{index}" for index in range(300_000)]
    assert "lists 300000 labels" in str(attempt(folder, changed(good, FILE, labels=labels)))


@pytest.mark.parametrize(
    "pattern", ["(.*)*(.*)*(.*)*!", "(a|a|b|.)*!", "((.*)*)*!", "a{10000000}", "(?:.*e|.*r)*(?:.*[a-z]+)*!"]
)
def test_a_pattern_that_backtracks_or_unfolds_is_matched_in_bounded_steps(
    pattern: str, good: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = json.loads(good[FILE])["lora"]
    bare = {name: good[name] for name in (TENSORS, CONFIG)}
    monkeypatch.setattr(Budget, "STEPS", 200_000)
    assert attempt(folder, changed(bare, CONFIG, alpha_pattern={pattern: 3.0})) is None
    ranks = {**lora, "rank_pattern": {pattern: 3, "query": 2}}
    assert attempt(folder, changed(good, FILE, lora=ranks)) is None
    named = {**lora, "target_modules": pattern}
    assert "matches nothing" in str(attempt(folder, changed(good, FILE, lora=named)))


def test_the_patterns_of_an_adapter_share_one_budget(
    good: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "STEPS", 200_000)
    lora = json.loads(good[FILE])["lora"]
    patterns = {f"(.*.*)*{number}": 2 for number in range(400)}
    for files in (
        changed({name: good[name] for name in (TENSORS, CONFIG)}, CONFIG, alpha_pattern=patterns),
        changed(good, FILE, lora={**lora, "rank_pattern": {**patterns, "query": 2}}),
    ):
        assert "takes too long to match" in str(attempt(folder, files))


def test_a_negative_alpha_is_refused(good: dict[str, bytes], folder: Path) -> None:
    bare = {name: good[name] for name in (TENSORS, CONFIG)}
    assert "alpha is not usable; got -8" in str(attempt(folder, changed(bare, CONFIG, lora_alpha=-8)))


def test_an_oversized_header_is_refused_before_it_is_parsed(good: dict[str, bytes], folder: Path) -> None:
    content = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" * 100
    assert "header of 16,777,217 bytes" in str(attempt(folder, {**good, TENSORS: content}))


def test_links_out_of_the_directory_are_refused_and_those_of_a_hub_cache_followed(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "secret").write_text("secret")
    (adapter / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"out in .* is a link to another place"):
        read_bytes(adapter, "out")
    (adapter / "device").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="link to another place"):
        read_bytes(adapter, "device")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "d1gest").write_text("{}")
    (snapshot / CONFIG).symlink_to(Path("../../blobs/d1gest"))
    assert read_bytes(snapshot, CONFIG) == b"{}"
    inside = snapshot / "last-checkpoint"
    inside.mkdir()
    (inside / CONFIG).symlink_to(Path("../../../blobs/d1gest"))
    assert read_bytes(inside, CONFIG) == b"{}"
    (inside / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link to another place"):
        read_bytes(inside, "out")


def test_a_linked_adapter_directory_is_an_ordinary_one(good: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, content in good.items():
        (tmp_path / "real" / name).write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    load_adapter(tiny_classifier(), tmp_path / "link")


class Exploit:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(good: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(good[CONFIG])
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match=f"{TENSORS} is missing"):
        load_adapter(tiny_classifier(), tmp_path)
    (tmp_path / TENSORS).write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match="safetensors"):
        load_adapter(tiny_classifier(), tmp_path)


def test_code_beside_an_adapter_is_not_run(adapter_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in adapter_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / FILE).write_text(json.dumps({**json.loads((copy / FILE).read_text()), "sha256": {}}))
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    try:
        TextClassifier.from_pretrained(copy)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_control_characters_of_others_do_not_reach_the_terminal(
    good: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable("a\x1b[31mb\n\u202ec\x00 é 漢") == "a\\x1b[31mb\\n\\u202ec\\x00 é 漢"
    files = changed(good, FILE, labels=["\x1b]0;owned\x07", "b\rc", "fine"])
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert main(["info", "--adapter", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "\r" not in printed and "owned" in printed
    missing = str(tmp_path / "\x1b[2Jgone")
    assert main(["info", "--adapter", missing]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["\x9b31mowned", "owned\u202e", "\x1b]0;owned\x07"])
def test_texts_and_labels_in_json_do_not_reach_the_terminal_raw(
    text: str, adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    info = json.loads((folder / FILE).read_text())
    labels = [text, *info["labels"][1:]]
    (folder / FILE).write_text(json.dumps({**info, "labels": labels}))
    for arguments in (
        ["predict", "--adapter", str(folder), text],
        ["info", "--adapter", str(folder), "--json"],
    ):
        assert main(arguments) == 0
        printed = capsys.readouterr().out.rstrip("\n")
        assert printable(printed) == printed and "owned" in printed
        found = json.loads(printed)
        assert text in found["scores"] if "scores" in found else found["labels"] == labels


def test_a_card_shows_labels_and_makes_nothing_of_them(adapter_dir: Path) -> None:
    labels = ("<img src=x onerror=alert(1)>", "![](https://x/y.png)", "a|b`c`", "---\nlicense: mit")
    run = RunSummary(
        model_name="<script>",
        label_counts={"train": dict.fromkeys(labels, 1)},
        class_errors={
            label: {"support": 3, "wrong": 2, "wrong_disabled": 1, "false_positives": 0} for label in labels
        },
    )
    card = render_card(AdapterInfo(labels), LoRAConfig(), ParameterCount(2, 4, 1, 1), run=run)
    body = card.split("\n---\n", 1)[1]
    # Whatever opens HTML, a picture or a cell in a label has a backslash before it.
    assert not re.search(r"(?<!\\)<(img|script)|!\[\]|(?<!\\)`c|license: mit$", body)
    assert body.count(r"\<img src=x") == 4 and body.count(r"a\|b\`c\`") == 4


BERT = "base_model.model.bert.encoder.layer.0.attention.self.query"


def factors(folder: Path, good: dict[str, bytes], **shapes: tuple[int, ...]) -> AdapterFiles:
    """A directory of an adapter with these factors of one module alone, as peft writes it."""
    tensors = {f"{BERT}.lora_{side}.weight": torch.ones(shape) for side, shape in shapes.items()}
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    (folder / CONFIG).write_bytes(changed(good, CONFIG, rank_pattern={}, r=2, modules_to_save=None)[CONFIG])
    return read_adapter(folder)


@pytest.mark.parametrize(
    "shapes",
    [
        {"A": (2, 8)},
        {"B": (8, 2)},
        {"A": (), "B": (8, 2)},
        {"A": (2,), "B": (8, 2)},
        {"A": (2, 8), "B": (8,)},
        {"A": (3, 8), "B": (8, 2)},
        {"A": (2, 0), "B": (8, 2)},
        {"A": (0, 8), "B": (8, 0)},
    ],
    ids=str,
)
def test_what_is_no_product_is_refused_by_info_and_arithmetic(
    shapes: dict[str, tuple[int, ...]], good: dict[str, bytes], tmp_path: Path
) -> None:
    files = factors(tmp_path, good, **shapes)
    for reader in (describe, Adapter.from_files):
        with pytest.raises(ValueError, match=r"A and B of 'bert.* are no low-rank product; got shapes"):
            reader(files)
    with pytest.raises(ValueError, match=r"does not fit|rank"):
        load_adapter(tiny_classifier(), tmp_path)


def test_the_norm_of_a_rank_beyond_the_sizes_takes_no_square_of_it(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    files = factors(tmp_path, good, A=(25_000, 1), B=(1, 25_000))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    norms = describe(files)["delta_norms"].values()
    # ΔW is one number, alpha / r = 8 / 2 times the sum of 25,000 products.
    assert list(norms) == pytest.approx([4 * 25_000])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000


@pytest.mark.slow
def test_thousands_of_names_are_compared_with_thousands(good: dict[str, bytes], tmp_path: Path) -> None:
    names = [f"bert.m{number}.query" for number in range(6000)]
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.empty(0, 0) for name in names for side in "AB"
    }
    (tmp_path / TENSORS).write_bytes(safetensors.torch.save(tensors))
    targets = [f"m{number}.query" for number in range(26_000)]
    config = changed(good, CONFIG, target_modules=targets, modules_to_save=targets, rank_pattern={})
    (tmp_path / CONFIG).write_bytes(config[CONFIG])
    assert read_adapter(tmp_path).config.target_modules == tuple(sorted(names))
    with pytest.raises(ValueError, match=r"target_modules names a module that BertFor.* does not have"):
        load_adapter(tiny_classifier(), tmp_path)


def test_a_large_file_without_contents_is_not_read(good: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / TENSORS, 1 << 40)
    with pytest.raises(ValueError, match=f"{TENSORS} in .* is too large; got 1,099,511,627,776 bytes"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("piece", ["![", "<img ", "![](", "<img src='", "![a](x.png) <img src='y.png'> "])
def test_the_pictures_of_a_long_card_are_found_in_one_pass(
    piece: str, good: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in {**good, "x.png": b"x", "y.png": b"y", "z.png": b"z"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text(piece * 100_000)
    shown = {"x.png", "y.png"} if "png" in piece else set()
    assert adapter_contents(tmp_path).keys() == {*good, "README.md", *shown}


@pytest.mark.parametrize("value", [-5, 0, 2**31, 2**64])
def test_lengths_that_no_text_has_are_refused(value: int, good: dict[str, bytes], folder: Path) -> None:
    assert "max_length is not usable" in str(attempt(folder, changed(good, FILE, max_length=value)))


@pytest.mark.parametrize("value", [3, "classifier", {"a": 1}, [3], [["classifier"]], [None]])
def test_modules_to_save_of_other_types_are_refused(value: Any, good: dict[str, bytes], folder: Path) -> None:
    bare = {name: good[name] for name in (TENSORS, CONFIG)}
    for files in (good, bare):
        assert "modules_to_save" in str(attempt(folder, changed(files, CONFIG, modules_to_save=value)))
