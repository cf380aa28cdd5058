from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from hf_lora._files import WriteError, replacing, whole_file, write_text, writing
from hf_lora.training.checkpoints import ending_on_sigterm, writing_checkpoint


def contents(directory: Path) -> dict[str, str]:
    """Every file below a directory by its relative path, with its text."""
    return {
        str(path.relative_to(directory)): path.read_text(encoding="utf-8")
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "adapter"
    with replacing(target) as folder:
        (folder / "a.txt").write_text("A")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("B")
        assert not target.exists()
        assert folder.parent == target.parent
    assert contents(tmp_path) == {"deep/er/adapter/a.txt": "A", "deep/er/adapter/sub/b.txt": "B"}
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


def test_existing_directory_keeps_other_files(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "stale.txt").write_text("stale")
    (target / "same.txt").write_text("old")
    (target / "other.txt").write_text("other")
    with replacing(target) as folder:
        (folder / "same.txt").write_text("new")
        (folder / "added.txt").write_text("added")
        (folder / "sub").mkdir()
        (folder / "sub" / "fresh.txt").write_text("fresh")
        assert contents(target) == {"same.txt": "old", "other.txt": "other", "sub/stale.txt": "stale"}
    expected = {"same.txt": "new", "added.txt": "added", "other.txt": "other", "sub/fresh.txt": "fresh"}
    assert contents(target) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_everything_as_before(
    tmp_path: Path, exists: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "adapter"
    if exists:
        target.mkdir()
        (target / "same.txt").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(error, match="stop"), replacing(target) as folder:
        (folder / "same.txt").write_text("new")
        raise error("stop")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if exists else [])


def test_last_files_are_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    order: list[str] = []
    replace = Path.replace

    def recorded(self: Path, to: Path) -> Path:
        order.append(Path(to).name)
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", recorded)
    with replacing(target, last=("a.json", "m.json")) as folder:
        for name in ("z.bin", "m.json", "a.json", "b.txt"):
            (folder / name).write_text(name)
    assert order == ["b.txt", "z.bin", "a.json", "m.json"]
    assert contents(target) == {name: name for name in order}


def test_interrupted_replacement_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    for name in ("a", "b", "digest"):
        (target / name).write_text("old")
    replace = Path.replace

    def failing(self: Path, to: Path) -> Path:
        if Path(to).name == "b":
            raise OSError("disk full")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk full"), replacing(target, last=("digest",)) as folder:
        for name in ("a", "b", "digest"):
            (folder / name).write_text("new")
    assert contents(target) == {"a": "new", "b": "old", "digest": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "folders", "files"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_what_is_written_has_the_modes_of_the_umask(
    mask: int, folders: int, files: int, tmp_path: Path
) -> None:
    with umask(mask):
        write_text(tmp_path / "alone.txt", "text")
        with replacing(tmp_path / "adapter") as folder:
            (folder / "sub").mkdir()
            for path in (folder / "a.txt", folder / "sub" / "b.txt"):
                path.write_text("text")
                path.chmod(0o600)  # as some writers do
        with replacing(tmp_path / "adapter") as folder:
            (folder / "c.txt").write_text("into one that is there")
        with writing_checkpoint(tmp_path / "checkpoint-1") as folder:
            (folder / "state.json").write_text("text")
    found = {path.relative_to(tmp_path).as_posix(): mode(path) for path in tmp_path.rglob("*")}
    directories = ("adapter", "adapter/sub", "checkpoint-1")
    assert {found.pop(name) for name in directories} == {folders}
    assert len(found) == 6 and set(found.values()) == {files}


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing file",
        "basic_ios::clear: iostream error",
    ],
)
def test_what_torch_says_of_a_full_disk_is_one_line(words: str, tmp_path: Path) -> None:
    one_line = pytest.raises(WriteError, match=r"optimizer.pt' could not be written; got .* MB free")
    with one_line, writing(tmp_path / "optimizer.pt"):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="not about files"), writing(tmp_path):
        raise RuntimeError("not about files")


def test_sigterm_inside_a_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "adapter" / "a.txt", "old")
    for write in (
        partial(replacing, tmp_path / "adapter"),
        partial(whole_file, tmp_path / "adapter" / "a.txt"),
    ):
        with pytest.raises(SystemExit) as ended, ending_on_sigterm(), write():
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143
    assert contents(tmp_path) == {"adapter/a.txt": "old"}


def test_write_text_is_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "card.md"
    write_text(path, "schön 日本\n")
    assert path.read_bytes() == "schön 日本\n".encode()
    write_text(path, "second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in path.parent.iterdir()] == ["card.md"]


def test_failed_write_text_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text("old")
    # A lone surrogate cannot be encoded: the failure comes in the middle of writing.
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert contents(tmp_path) == {"card.md": "old"}
