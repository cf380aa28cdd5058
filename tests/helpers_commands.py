"""Helpers for tests of commands: run one, and read what it printed."""

from __future__ import annotations

import pytest

from hf_lora.cli import main as cli

Captured = pytest.CaptureFixture[str]
# Oracles compute in fp32, whatever this machine is good at.
FP32 = ("--precision", "fp32")


def call(*argv: object) -> int | str | None:
    """The exit code of `hf-lora argv...`, run in this process."""
    try:
        return cli.main([str(part) for part in argv])
    except SystemExit as exit:
        return exit.code


def run(capsys: Captured, *argv: object) -> str:
    """Standard output of a command that succeeds."""
    assert call(*argv) == 0
    return capsys.readouterr().out


def mistake(capsys: Captured, *argv: object) -> str:
    """The last line on standard error of a command that the user called wrongly."""
    assert call(*argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def cells(line: str) -> list[str]:
    """The cells of a printed row."""
    return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]


def rows(out: str, title: str = "") -> list[list[str]]:
    """The rows of the printed table that starts with a title; without one, of all tables."""
    part = out[out.index(title) :].split("└")[0] if title else out
    return [cells(line) for line in part.splitlines() if line.startswith("│")]


def table(out: str) -> dict[str, list[str]]:
    """The rows of printed tables: the first cell, and those after it."""
    return {row[0]: row[1:] for row in rows(out)}
