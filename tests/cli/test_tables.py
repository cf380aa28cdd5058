from __future__ import annotations

import pytest
from helpers_commands import cells

from hf_lora.cli.tables import print_class_errors, print_table


def printed(
    capsys: pytest.CaptureFixture[str], title: str, columns: list[str], rows: list[list]
) -> list[str]:
    print_table(title, columns, rows)
    return capsys.readouterr().out.splitlines()


def test_cells_are_formatted_by_type(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["accuracy", 0.123456, 1234567, None], ["f1", 2.0, -5, "text"]]
    lines = printed(capsys, "results", ["metric", "value", "count", "note"], rows)
    assert lines[0].rstrip() == "results"
    assert cells(lines[2]) == ["metric", "value", "count", "note"]
    assert cells(lines[4]) == ["accuracy", "0.1235", "1,234,567", ""]
    assert cells(lines[5]) == ["f1", "2.0000", "-5", "text"]


def test_columns_of_numbers_are_right_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "t", ["n", "mixed"], [[1, 1], [1000, "word"], [None, 2.5]])
    numbers, mixed = zip(*(line.strip("│").split("│") for line in lines[4:7]), strict=True)
    assert numbers == ("     1 ", " 1,000 ", "       ")
    assert mixed == (" 1      ", " word   ", " 2.5000 ")


def test_no_rows_print_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "empty", ["a", "b"], [])
    assert cells(lines[2]) == ["a", "b"]


def test_brackets_are_text_and_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "t", ["label"], [["[red]sport[/red]"]])
    assert cells(lines[4]) == ["[red]sport[/red]"]


@pytest.mark.parametrize("length", [150, 300])
def test_long_cells_stay_on_one_line_outside_a_terminal(
    capsys: pytest.CaptureFixture[str], length: int
) -> None:
    lines = printed(capsys, "t", ["path", "n"], [["x" * length, 1]])
    assert cells(lines[4]) == ["x" * length, "1"]


def errors_of(wrong: list[int]) -> dict[str, dict[str, int]]:
    return {
        f"label {number}": {"support": 9, "wrong": count, "wrong_disabled": 9}
        for number, count in enumerate(wrong)
    }


def test_errors_of_few_labels_are_all_printed_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    print_class_errors(errors_of([1, 3] * 10), "elsewhere")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "errors by class"
    expected = [[f"label {number}", "9", str([1, 3][number % 2]), "9"] for number in range(20)]
    assert [cells(line) for line in lines[4:-1]] == expected


def test_of_many_labels_those_with_the_most_errors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [0, 1, 5, 2, *[1] * 20]
    print_class_errors(errors_of(wrong), "in metrics.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "errors by class"
    shown = [cells(line)[0] for line in lines[4:-2]]
    assert shown == ["label 2", "label 3", "label 1", *(f"label {number}" for number in range(4, 21))]
    assert lines[-1] == "the 20 of 24 labels with the most errors; all of them are in metrics.json"
