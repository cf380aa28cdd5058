"""Repositories as the Hub keeps them, in memory: files, commits, branches, pull requests; and its rules for cards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
# The part of the Hub's list that the adapters of the tests and scripts use.
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "other", "unknown")


@dataclass(frozen=True)
class Blob:
    """One file's content; `lfs`: kept in the large file storage, with a pointer in git."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        """The name of the content in the large file storage."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git keeps in the place of a large file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @property
    def git_id(self) -> str:
        """What `git hash-object` prints."""
        kept = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        """What a download is cached under."""
        return self.sha256 if self.lfs else self.git_id


@dataclass(frozen=True)
class Commit:
    """The state of all files after a change."""

    files: Mapping[str, Blob]
    message: str
    parent: str | None = None

    @property
    def id(self) -> str:
        """40 hexadecimal digits that depend on the files, the message and the past."""
        tree = "\n".join(f"{blob.git_id} {path}" for path, blob in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}\n{self.message}\n{tree}".encode()).hexdigest()


@dataclass
class Repository:
    """A model repository: commits by id, and the commit of each branch, tag and pull request."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def __post_init__(self) -> None:
        self.refs["main"] = self._add(
            Commit({".gitattributes": Blob(b"*.bin filter=lfs\n")}, "initial commit")
        )

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, pull request or commit id means."""
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, files: Mapping[str, Blob], message: str) -> str:
        """Add a commit with exactly these files to a branch; returns its id."""
        self.refs[ref] = self._add(Commit(dict(files), message, self.refs.get(ref)))
        return self.refs[ref]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The contents by path, without git's own file."""
        found = self.find(revision)
        assert found is not None, revision
        return {path: blob.content for path, blob in found.files.items() if path != ".gitattributes"}

    def history(self, revision: str = "main") -> list[str]:
        """The messages of a branch's commits, the newest first."""
        messages, commit = [], self.find(revision)
        while commit is not None:
            messages.append(commit.message)
            commit = self.commits.get(commit.parent or "")
        return messages

    def _add(self, commit: Commit) -> str:
        self.commits[commit.id] = commit
        return commit.id


def folder_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings that the Hub has for a card's metadata; a part of its rules."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        return [f"bad yaml: {str(error).splitlines()[0]}"], []
    if not isinstance(metadata, dict):
        return ["the metadata must be an object"], []
    return [problem for name, check in _CARD_RULES.items() for problem in check(name, metadata.get(name))], []


def _ids(what: str, slash: bool) -> Any:
    def check(name: str, value: Any) -> list[str]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        pattern = REPOSITORY_ID if slash else re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}")
        return [
            f'"{name}" with value "{entry}" is not valid. Use a {what} id from https://hf.co/{what}s.'
            for entry in values
            if not isinstance(entry, str) or not pattern.fullmatch(entry)
        ]

    return check


def _license(name: str, value: Any) -> list[str]:
    return [] if value is None or value in LICENSES else [f'"{name}" must be one of {list(LICENSES)}']


def _strings(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [f'"{name}" must be a string' for entry in values if not isinstance(entry, str)]


def _model_index(name: str, value: Any) -> list[str]:
    """`model-index` is a list of models with results; each result has a task, a data set and metrics."""
    required = {"task": ("type",), "dataset": ("type", "name"), "metrics": ("type", "value")}
    problems = []
    for model in value or []:
        if not isinstance(model, dict) or not model.get("name"):
            problems.append(f'"{name}[0].name" is required')
            continue
        for number, result in enumerate(model.get("results") or []):
            for part, keys in required.items():
                entries = result.get(part)
                for entry in entries if isinstance(entries, list) else [entries or {}]:
                    problems += [
                        f'"{name}[0].results[{number}].{part}.{key}" is required'
                        for key in keys
                        if key not in entry
                    ]
    return problems


_CARD_RULES = {
    "base_model": _ids("model", slash=False),
    "datasets": _ids("dataset", slash=False),
    "license": _license,
    "language": _strings,
    "tags": _strings,
    "pipeline_tag": _strings,
    "library_name": _strings,
    "model-index": _model_index,
}
