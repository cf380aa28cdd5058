"""The checkpoints of a run: written whole with checksums, verified, found again, rotated.

A checkpoint is staged in a hidden folder beside its place, gets a list of its files with their sizes and sha256,
is synced to the disk, and appears under its name by one rename. What a killed process leaves is either a
whole checkpoint or a hidden folder that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from hf_lora._files import synced, writing

CHECKSUMS = "checksums.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_STAGED, _REPLACED, _DELETED = ".partial", ".replaced", ".deleted"
_LEFTOVER = re.compile(
    rf"\.(checkpoint-[0-9]+)({re.escape(_STAGED)}|{re.escape(_REPLACED)}|{re.escape(_DELETED)})"
)


def _nothing() -> None:
    """What a single process waits for."""


@contextmanager
def writing_checkpoint(
    target: Path, *, writes: bool = True, wait: Callable[[], None] = _nothing
) -> Iterator[Path]:
    """Yield the folder in which the files of the checkpoint `target` are written; then it appears whole.

    writes: whether this process makes and names the folder; others only add files of their own to it.
    wait: returns when all processes have called it.
    Raises OSError, in one line, where the files cannot be written. Earlier checkpoints stay as they are.
    """
    folder = _hidden(target, _STAGED)
    with writing(target):
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        wait()
        try:
            yield folder
            wait()
            if writes:
                (folder / CHECKSUMS).write_text(_checksums(folder), encoding="utf-8")
                synced(folder)
                _put_in_place(folder, target)
        except BaseException:
            if writes:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        wait()


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None for one that is as it was written."""
    try:
        listed = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{CHECKSUMS} names a file outside"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if _sha256(path) != digest:
            return f"{name} was changed: its sha256 is another"
    return None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint directories of a run by their names, the oldest step first."""
    return sorted((path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def newest_complete(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each that is newer."""
    broken: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(output)):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint, broken
        broken[checkpoint] = reason
    return None, broken


def rotate(output: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never `newest`, just written, and never the best.

    Those of a later step than `newest` are of a run that was given up, and go first.
    """
    if not limit or limit < 1:
        return
    found = checkpoints(output)
    kept = {newest.name} | ({Path(best).name} if best else set())
    later = [path for path in found if step_of(path) > step_of(newest)]
    candidates = [path for path in (*later, *found) if path.name not in kept]
    for path in list(dict.fromkeys(candidates))[: max(0, len(found) - max(limit, len(kept)))]:
        delete(path)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint: from its name at once, then its files."""
    doomed = _hidden(checkpoint, _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(output: Path) -> None:
    """Remove what a killed run left half-made; a checkpoint that was about to be replaced comes back."""
    for path in output.glob(".checkpoint-*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        place = output / match.group(1)
        if match.group(2) == _REPLACED and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(folder: Path, target: Path) -> None:
    replaced = _hidden(target, _REPLACED)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    folder.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    synced(target.parent, inside=False)


def _hidden(checkpoint: Path, suffix: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}{suffix}")


def _checksums(folder: Path) -> str:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }
    # Without a line break at the end: every byte counts, so that a file cut off is never whole.
    return json.dumps({"format_version": 1, "files": files}, indent=2)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
