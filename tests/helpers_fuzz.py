"""Hostile adapter directories, each made from its number alone; `python tests/helpers_fuzz.py 17` tries one again.

A case is tried by every reader. Right outcomes are a load, and a ValueError or OSError in one line of bounded length.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import string
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from conftest import randomize, tiny_classifier, tiny_tokenizer

from hf_lora import LoRAConfig, inject_lora, load_adapter, remove_lora, save_adapter
from hf_lora.adapters.arithmetic import resize
from hf_lora.adapters.directory import CONFIG, TENSORS, read_adapter
from hf_lora.adapters.hub import adapter_contents
from hf_lora.adapters.info import FILE
from hf_lora.adapters.values import Adapter
from hf_lora.insight.report import describe
from hf_lora.lora.inject import is_injected
from hf_lora.models.tokenizer_files import load_tokenizer_files

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MOST_CHARACTERS = 2000
# For one case: seconds of processor time, and bytes beyond what an idle process has.
SECONDS, MEMORY = 20, 3 << 30
LONG = "x" * 100_000
EVIL: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        -5,
        1,
        2,
        10**9,
        2**31,
        2**63,
        2**64,
        10**400,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "a",
        LONG,
        "../../../etc/passwd",
        "/dev/zero",
        "\x1b[2J",
        "\x9b31m",
        "\u202e",
        "\ud800",
        "query\n",
        "https://x/",
        ".",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [3],
        ["query"],
        ["query"] * 1000,
        [LONG],
        {"a": 1},
        {"": {}},
        {"query": "8"},
        {LONG: LONG},
    ),
    *(
        {".*": -3},
        {"query": 10**9},
        {"query": None},
        [True],
        [{"a": 1}],
        [[[[[]]]]],
        {"type": "LORA"},
        "all-linear",
    ),
]
PATTERNS = [
    *(
        "(",
        ")",
        "(a+)+$",
        "(.*)*(.*)*x",
        "(a|a)*b",
        "a{10000000}",
        "((a{1000}){1000}){1000}",
        "(?x)query #",
        "(?i)query",
    ),
    *(
        r"(a)\1",
        "[",
        "[^",
        "*",
        "a**",
        "(?P<n>",
        r"(?<=a+)b",
        "(?R)",
        r"\p{L}",
        "((((((((((((((((((((((a))))))))))))))))))))))",
    ),
    *(
        ".*" * 400,
        "(?:.*a)*" * 100,
        "query|" * 150,
        "",
        "^$",
        "\\",
        "a{9999999999999999999999}",
        LONG,
        "(?:" * 300 + ")" * 300,
    ),
]


class Case:
    """A directory that was made, and what was done to it."""

    def __init__(self, number: int, good: Path, folder: Path) -> None:
        self.draw = random.Random(number)
        self.folder = folder
        shutil.copytree(good, folder)
        self.kind = list(KINDS)[number % len(KINDS)]
        # Also without the sidecar, as peft writes it.
        if self.kind != "sidecar" and self.draw.random() < 0.3:
            (folder / FILE).unlink()
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            KINDS[self.kind](self)

    def value(self) -> Any:
        """Something that should not be there."""
        value = copy.deepcopy(self.draw.choice(EVIL))
        return self.text() if self.draw.random() < 0.1 else value

    def text(self) -> str:
        return "".join(
            self.draw.choice(string.printable + "é漢\u202e\x9b\x00") for _ in range(self.draw.randint(0, 30))
        )

    def json(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change the JSON of a file; once it is none any more nothing is changed."""
        path = self.folder / name
        try:
            values = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError):
            return
        values = change(values)
        path.write_bytes(json.dumps(values).encode("utf-8", "surrogatepass"))

    def mutated(self, values: Any) -> Any:
        """One value of a JSON object, at any depth, replaced, dropped, renamed, repeated or put elsewhere."""
        places = list(_places(values))
        if not places:
            return self.value()
        # Large tables would be chosen nearly always.
        place, key = self.draw.choice(places if self.draw.random() < 0.3 else places[:60])
        kind = self.draw.choice(("value", "value", "value", "drop", "rename", "many", "swap"))
        if kind == "drop":
            del place[key]
        elif kind == "rename" and isinstance(place, dict):
            place[self.draw.choice((self.text(), LONG, "type"))] = place.pop(key)
        elif kind == "many":
            place[key] = [copy.deepcopy(place[key])] * self.draw.choice((0, 2, 1000))
        elif kind == "swap":
            other, at = self.draw.choice(places[:60])
            place[key] = copy.deepcopy(other[at])
        else:
            place[key] = self.value()
        return values

    def pattern(self) -> str:
        if self.draw.random() < 0.5:
            return self.draw.choice(PATTERNS)
        atoms = ("a", ".", "query", r"\.", r"\d", "[a-z]", "layer", "(?=.*y)", "(?!x)", "^", "$", r"\b")
        pattern = self.draw.choice(atoms)
        for _ in range(self.draw.randint(1, 12)):
            other = self.draw.choice(atoms)
            forms = (
                pattern + other,
                f"(?:{pattern})*",
                f"({pattern}|{other})",
                f"(?:{pattern}){{2,}}",
                f"{other}{pattern}",
            )
            pattern = self.draw.choice(forms)
        return pattern

    def damage(self) -> None:
        content = bytearray((self.folder / TENSORS).read_bytes())
        for _ in range(self.draw.randint(1, 4)):
            # Mostly in the header, where structure is.
            content[self.draw.randrange(min(len(content), 4000))] = self.draw.randrange(256)
        if self.draw.random() < 0.5:
            content = content[: self.draw.randint(8, len(content))]
        (self.folder / TENSORS).write_bytes(bytes(content))

    def header(self) -> None:
        content = (self.folder / TENSORS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        try:
            header = json.loads(content[8 : 8 + length])
        except ValueError:
            return
        kinds = ("F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "X", "F8_E8M0", "F4")
        entry = header.get(self.draw.choice(sorted(header))) if header else None
        if isinstance(entry, dict) and self.draw.random() < 0.6:
            what = self.draw.choice(("dtype", "shape", "data_offsets"))
            numbers = [
                self.draw.choice((0, 1, 4, 32, -1, 2**32, 2**63)) for _ in range(self.draw.randint(0, 4))
            ]
            entry[what] = self.draw.choice(kinds) if what == "dtype" else numbers
        else:
            header = self.mutated(header)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        size = len(text) if self.draw.random() < 0.9 else self.draw.getrandbits(64)
        (self.folder / TENSORS).write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])

    def shapes(self) -> None:
        """Tensors that are read well and fit nothing."""
        tensors = safetensors.torch.load((self.folder / TENSORS).read_bytes())
        key = self.draw.choice(sorted(tensors))
        kind = self.draw.randrange(8)
        if kind == 0:
            shape = self.draw.choice(
                ((), (0,), (3,), (0, 0), (1, 1, 1, 1), (4, 0), (0, 32), (70_000, 1), (1, 70_000))
            )
            tensors[key] = torch.ones(shape)
        elif kind == 1:
            del tensors[key]
        elif kind == 2:
            tensors[key] = tensors[key].flatten()
        elif kind == 3:
            tensors[
                self.draw.choice(
                    (self.text(), LONG, f"{key}.x", key.replace("lora_A", "lora_magnitude_vector"))
                )
            ] = tensors[key].clone()
        elif kind == 4:
            tensors |= {f"base_model.model.bert.m{i}.lora_A.weight": torch.empty(0, 4) for i in range(2000)}
        elif kind == 5:
            module = key.partition(".lora_")[0]
            rank = self.draw.choice((0, 1, 7, 20_000))
            tensors |= {
                f"{module}.lora_A.weight": torch.ones(rank, 1),
                f"{module}.lora_B.weight": torch.ones(1, rank),
            }
        elif kind == 6:
            tensors[key] = torch.full_like(
                tensors[key], self.draw.choice((float("nan"), float("inf"), 1e38, 0.0))
            )
        else:
            tensors[key] = tensors[key].to(
                self.draw.choice((torch.int64, torch.bool, torch.float16, torch.complex64))
            )
        (self.folder / TENSORS).write_bytes(safetensors.torch.save(tensors))

    def config(self) -> None:
        self.json(CONFIG, self.mutated)

    def sidecar(self) -> None:
        self.json(FILE, self.mutated)

    def no_json(self) -> None:
        name = self.draw.choice((CONFIG, FILE, TOKENIZER, TOKENIZER_CONFIG))
        deep = (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'{"r": 1' + b"0" * 10_000 + b"}",
            b"\xff\xfe",
            b"",
            b"null",
            b"NaN",
        )
        random_bytes = self.draw.randbytes(self.draw.randint(0, 200))
        value = json.dumps(self.value()).encode("utf-8", "surrogatepass")
        (self.folder / name).write_bytes(self.draw.choice((*deep, random_bytes, value)))

    def patterns(self) -> None:
        where, several = (
            self.draw.choice(("rank_pattern", "alpha_pattern", "target_modules")),
            self.draw.choice((1, 1, 20, 300)),
        )
        value: Any = {f"{self.pattern()}": self.draw.choice((2, 2, 4, 3.5)) for _ in range(several)}
        if where == "target_modules":
            value = self.pattern()

        def change(values: Any) -> Any:
            place = values.get("lora") if "lora" in values else values
            if isinstance(place, dict):
                place[where] = value
            return values

        self.json(FILE if (self.folder / FILE).exists() else CONFIG, change)

    def tokenizer(self) -> None:
        self.json(TOKENIZER, self.mutated)

    def tokenizer_config(self) -> None:
        self.json(TOKENIZER_CONFIG, self.mutated)

    def pipeline(self) -> None:
        """Parts of a tokenizer that exist, in places where they do not belong or cost too much."""
        parts = [
            *(
                {"type": name}
                for name in (
                    "NFC",
                    "NFKD",
                    "Lowercase",
                    "StripAccents",
                    "ByteLevel",
                    "Strip",
                    "Whitespace",
                    "X",
                )
            ),
            *(
                {"type": "Replace", "pattern": {"Regex": self.pattern()[:2000]}, "content": "x" * n}
                for n in (0, 1, 30_000)
            ),
            *({"type": "Replace", "pattern": {"String": text}, "content": "aa"} for text in ("", "a", LONG)),
            {"type": "Prepend", "prepend": "x" * self.draw.choice((1, 30_000))},
            {"type": "Precompiled", "precompiled_charsmap": self.draw.choice(("", "AAAA", "////////", LONG))},
            {
                "type": "Split",
                "pattern": {"Regex": self.pattern()[:2000]},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        ]
        chosen = [self.draw.choice(parts) for _ in range(self.draw.choice((1, 2, 5, 60)))]
        name = self.draw.choice(("normalizer", "pre_tokenizer"))
        inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[name]
        self.json(
            TOKENIZER,
            lambda values: (
                {**values, name: {"type": "Sequence", inner: chosen}} if isinstance(values, dict) else values
            ),
        )

    def links(self) -> None:
        """Something else than a file under a file's name, also one that is usually not there."""
        names = (
            CONFIG,
            TENSORS,
            FILE,
            TOKENIZER,
            TOKENIZER_CONFIG,
            "vocab.txt",
            "README.md",
            "added_tokens.json",
            "merges.txt",
        )
        path = self.folder / self.draw.choice(names)
        if path.is_dir() and not path.is_symlink():
            return
        content = path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 20 else b"{}"
        path.unlink(missing_ok=True)
        kind = self.draw.randrange(6)
        if kind == 0:
            (self.folder.parent / "secret").write_text("a secret")
            path.symlink_to(self.folder.parent / "secret")
        elif kind == 1:
            path.symlink_to(
                self.draw.choice(("/dev/zero", "/dev/null", "/proc/self/environ", "gone", path.name, ".."))
            )
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            os.mkfifo(path)
        elif kind == 4:
            with path.open("wb") as stream:
                stream.write(content)
                stream.truncate(self.draw.choice((1 << 20, 100 << 20, 1 << 40)))
        else:
            inside = self.folder / "inside"
            inside.write_bytes(content)
            path.symlink_to("inside")

    def card(self) -> None:
        piece = self.draw.choice(
            ("![", "<img ", "<img src=", "![](", "[", "(", "![a](x.png)", '<img src="../x.png">', "\x00")
        )
        (self.folder / "README.md").write_text(piece * self.draw.choice((1, 50_000)))
        (self.folder / "x.png").write_bytes(b"png")


KINDS: dict[str, Callable[[Case], None]] = {
    name: getattr(Case, name)
    for name in (
        *(
            "damage",
            "header",
            "shapes",
            "config",
            "sidecar",
            "no_json",
            "patterns",
            "tokenizer",
            "tokenizer_config",
        ),
        *("pipeline", "links", "card"),
    )
}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """The containers of a JSON value with the keys in them, the outermost first."""
    waiting = [value]
    while waiting:
        place = waiting.pop(0)
        keys = (
            list(place) if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else ()
        )
        for key in list(keys)[:200]:
            yield place, key
            waiting.append(place[key])


def good_adapter(folder: Path) -> Path:
    """An adapter that loads, with a tokenizer; its sidecar has no digests, so that changes are not seen by them."""
    model = tiny_classifier()
    inject_lora(model, LoRAConfig(rank=4, alpha=8, rank_pattern={"query": 2}))
    randomize(model)
    directory = save_adapter(
        model, folder / "good", tokenizer=tiny_tokenizer(), files={"README.md": "# card"}
    )
    info = json.loads((directory / FILE).read_text())
    (directory / FILE).write_text(json.dumps({**info, "sha256": {}}))
    return directory


class Trial:
    """Tries directories with every reader, on one model that each of them must leave as it was."""

    def __init__(self) -> None:
        self.model = tiny_classifier()
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def attempt(self, folder: Path) -> list[str | None]:
        """The error of each reader, or None where it succeeded. Raises AssertionError for a wrong outcome."""
        readers = (self._load, self._describe, self._resize, self._tokenize, adapter_contents)
        return [self._error(reader, folder) for reader in readers]

    def _error(self, reader: Callable[[Path], Any], folder: Path) -> str | None:
        try:
            reader(folder)
        except (ValueError, OSError) as error:
            text = str(error)
            assert text and len(text) <= MOST_CHARACTERS, (len(text), text[:300])
            assert len(text.splitlines()) == 1, text
            return text
        return None

    def _load(self, folder: Path) -> None:
        failed = True
        try:
            load_adapter(self.model, folder)
            failed = False
            with torch.no_grad():
                self.model(input_ids=torch.tensor([[5, 6, 7]]))
        finally:
            if is_injected(self.model):
                assert not failed, "a failed load left its layers"
                remove_lora(self.model)
                # The head came with the adapter, which is a correct load.
                self.model.load_state_dict(self.before)
            after = self.model.state_dict()
            assert self.before.keys() == after.keys()
            assert all(torch.equal(self.before[name], after[name]) for name in after)

    def _describe(self, folder: Path) -> None:
        json.dumps(describe(read_adapter(folder)))

    def _resize(self, folder: Path) -> None:
        resize(Adapter.from_files(read_adapter(folder)), rank=1)

    def _tokenize(self, folder: Path) -> None:
        tokenizer = load_tokenizer_files(read_adapter(folder).tokenizer, "the adapter")
        if tokenizer is not None:
            tokenizer(["good film", "a " * 200, "x" * 1000, ""], truncation=True, max_length=32)


def _too_slow(*_: Any) -> None:
    raise AssertionError(f"more than {SECONDS} s of processor time")


def run(first: int, count: int) -> Counter[str]:
    """Try cases in this process, under limits. Prints the number of each that goes wrong; returns the outcomes."""
    outcomes: Counter[str] = Counter()
    signal.signal(signal.SIGPROF, _too_slow)
    with tempfile.TemporaryDirectory() as temporary:
        good, trial = good_adapter(Path(temporary)), Trial()
        assert trial.attempt(good) == [None] * 5, trial.attempt(good)
        idle = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if sys.platform == "linux"
            else 0
        )
        resource.setrlimit(resource.RLIMIT_AS, (idle + MEMORY, -1))
        for number in range(first, first + count):
            print(f"case {number}", file=sys.stderr, flush=True)
            folder = Path(temporary) / str(number)
            try:
                case = Case(number, good, folder)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                errors = trial.attempt(folder)
                outcomes[f"{case.kind}: {'refused' if any(errors) else 'loaded'}"] += 1
            except BaseException:
                outcomes["wrong"] += 1
                print(f"WRONG {number}\n{traceback.format_exc(limit=-6)[-3000:]}", flush=True)
                trial = Trial()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                shutil.rmtree(folder, ignore_errors=True)
    return outcomes


if __name__ == "__main__":
    start, many = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    result = run(start, many)
    print(json.dumps(result))
    sys.exit(result["wrong"] > 0)
