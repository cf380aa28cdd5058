"""The tokenizer that an adapter brings: from its own directory only, as it was written, at a bounded cost."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from hf_lora import TextClassifier
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.hub import adapter_contents
from hf_lora.adapters.info import FILE
from hf_lora.cli.main import main
from hf_lora.models.tokenizer_files import load_tokenizer_files, read_tokenizer

SECRET = "a secret of this machine"


@pytest.fixture
def copy(adapter_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))


@pytest.fixture
def files(copy: Path) -> dict[str, bytes]:
    return read_tokenizer(copy)


@pytest.mark.parametrize("command", ["resize", "add", "predict", "push", "info"])
@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "special_tokens_map.json"])
def test_a_link_to_a_secret_is_refused_by_every_command(
    command: str, name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    output = ["--output_dir", str(tmp_path / "out")]
    arguments = {
        "resize": ["--adapter", str(copy), "--rank", "1", *output],
        "add": ["--adapters", str(copy), str(copy), *output],
        "predict": ["--adapter", str(copy), "a text"],
        "push": ["--adapter", str(copy), "--repo_id", "user/name"],
        "info": ["--adapter", str(copy)],
    }
    assert main([command, *arguments[command]]) == 2
    error = capsys.readouterr().err
    assert f"{name} in " in error and "is a link to another place" in error and SECRET not in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="link to another place"):
        adapter_contents(copy)


def test_a_hub_cache_links_into_its_store(adapter_dir: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(adapter_dir.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    linked, plain = (TextClassifier.from_pretrained(place) for place in (snapshot, adapter_dir))
    assert linked.predict("good film") == plain.predict("good film")


def test_devices_and_pipes_are_not_read(copy: Path) -> None:
    os.mkfifo(copy / "merges.txt")
    (copy / "vocab.json").symlink_to("/dev/zero")
    assert {"merges.txt", "vocab.json"}.isdisjoint(read_adapter(copy).tokenizer)


def test_two_words_swapped_are_noticed(copy: Path) -> None:
    path = copy / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokenizer.json in .* was changed after it was written"):
        TextClassifier.from_pretrained(copy)
    # Adapters of older versions have no digest of their tokenizer.
    info = json.loads((copy / FILE).read_text())
    info["sha256"] = {name: value for name, value in info["sha256"].items() if "adapter" in name}
    (copy / FILE).write_text(json.dumps(info))
    TextClassifier.from_pretrained(copy)


def test_a_file_that_was_added_later_changes_no_token(copy: Path) -> None:
    before = TextClassifier.from_pretrained(copy).logits(["good film"])
    (copy / "added_tokens.json").write_text('{"good": 3}')
    assert (TextClassifier.from_pretrained(copy).logits(["good film"]) == before).all()


def test_the_tokenizer_is_that_of_its_files(files: dict[str, bytes], tmp_path: Path) -> None:
    loaded = load_tokenizer_files(files, "somewhere")
    assert loaded is not None and loaded.name_or_path == "somewhere"
    text = "good film, bad film"
    assert loaded(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    loaded.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again").keys() == files.keys()
    assert load_tokenizer_files({}, "nowhere") is None


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def charsmap(text: str) -> str:
    return base64.b64encode((8).to_bytes(4, "little") + b"12345678" + text.encode() + b"\0").decode()


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(normalizer=sequence(*[replace({"String": "a"}, "a" * 30_000)] * 2)),
        lambda v: v.update(normalizer=sequence(*[replace({"String": "a"}, "aa")] * 30)),
        lambda v: v.update(normalizer=sequence(*[replace({"Regex": "x*"}, "b")] * 30)),
        lambda v: v.update(normalizer=sequence(*[{"type": "ByteLevel"}] * 30)),
        lambda v: v.update(normalizer=sequence(*[{"type": "NFD"}] * 2000)),
        lambda v: v.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 60_000)}
        ),
        lambda v: v.update(normalizer={"type": "Prepend", "prepend": "a" * 60_000}),
        lambda v: v.update(normalizer=replace({"Regex": "((a{1000}){1000}){1000}"}, "")),
        lambda v: v.update(normalizer=replace({"Regex": "a?" * 30_000}, "")),
        lambda v: v["post_processor"].update(single=v["post_processor"]["single"] * 10_000),
        lambda v: v["post_processor"]["special_tokens"]["[CLS]"].update(ids=[2] * 10_000),
        lambda v: v["model"].update(unk_token="u" * 10_000),
        lambda v: v["model"].update(type="WordPiece", max_input_chars_per_word=10**9),
    ],
)
def test_a_tokenizer_that_costs_too_much_is_refused(
    change: Callable[[dict[str, Any]], None], files: dict[str, bytes]
) -> None:
    values = json.loads(files["tokenizer.json"])
    change(values)
    refused_in_one_line({**files, "tokenizer.json": json.dumps(values).encode()}, "is not usable")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": GPT4}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence({"type": "Prepend", "prepend": "_"}, replace({"String": " "}, "_"))},
        {"normalizer": sequence({"type": "NFKD"}, {"type": "Lowercase"}, replace({"Regex": " {2,}"}, " "))},
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": BYTES, "decoder": BYTES},
        {
            "normalizer": BYTES,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]},
            "decoder": BYTES,
        },
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "_",
                "prepend_scheme": "always",
                "split": True,
            }
        },
    ],
)
def test_the_parts_of_usual_tokenizers_are_usable(parts: dict[str, Any], files: dict[str, bytes]) -> None:
    values = {**json.loads(files["tokenizer.json"]), **parts}
    assert (
        load_tokenizer_files({**files, "tokenizer.json": json.dumps(values).encode()}, "somewhere")
        is not None
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("tokenizer.json", content)
            for content in (b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"model": 3}')
        ),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "WordPiece", "vocab": {}}}'),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": [{"id": -1}], "model": {}}'),
        *(
            ("tokenizer_config.json", content)
            for content in (b"[]", b"3", b'{"tokenizer_class": 3}', b"\xff")
        ),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": 3}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": -5}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "x"}'),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": 3}',
        ),
    ],
)
def test_files_that_are_no_tokenizer_are_refused_in_one_line(
    name: str, content: bytes, files: dict[str, bytes]
) -> None:
    refused_in_one_line({**files, name: content}, "'somewhere'")


def refused_in_one_line(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer_files(files, "somewhere")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
