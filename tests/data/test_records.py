"""Texts one by one, without holding the file."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import pytest
from helpers_data import write, write_lines

from hf_lora.data import iter_texts


class TestIterTexts:
    def test_text_file_and_stream(self, tmp_path: Path) -> None:
        content = "one\n\ntwo words\r\nlast"
        expected = [("one",), ("",), ("two words",), ("last",)]
        assert list(iter_texts(write(tmp_path / "t.txt", content))) == expected
        assert list(iter_texts(io.StringIO(content))) == expected

    def test_pairs_and_nulls(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "t.jsonl", [{"q": "a", "c": None}, {"c": 3, "q": "b"}])
        assert list(iter_texts(path, text_column="q", text_pair_column="c")) == [("a", ""), ("b", "3")]

    def test_stream_is_read_one_line_at_a_time(self) -> None:
        class Lines(io.StringIO):
            given = 0

            def readline(self, size: int = -1) -> str:
                self.given += 1
                return f"line {self.given}\n"

        stream = Lines()
        texts = iter_texts(stream)
        assert [next(texts) for _ in range(3)] == [("line 1",), ("line 2",), ("line 3",)]
        assert stream.given == 3

    @pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "parquet"])
    def test_large_file_is_never_held(self, suffix: str, tmp_path: Path) -> None:
        text, count = "abcdefghij" * 100, 10_000  # 10 MB
        path = tmp_path / f"t.{suffix}"
        if suffix == "parquet":
            datasets.Dataset.from_dict({"text": [text] * count}).to_parquet(str(path), batch_size=500)
        else:
            line = {"jsonl": json.dumps({"text": text})}.get(suffix, text)
            header = {"csv": "text\n", "tsv": "text\n"}.get(suffix, "")
            write(path, header + f"{line}\n" * count)
        texts = iter_texts(path)
        next(texts)
        tracemalloc.start()
        assert sum(len(row[0]) for row in texts) == len(text) * (count - 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4_000_000

    def test_mistake_at_the_end_is_met_at_the_end(self, tmp_path: Path) -> None:
        texts = iter_texts(write(tmp_path / "t.csv", "text\n" + "a\n" * 50_000 + "b,c\n"))
        assert Counter(next(texts) for _ in range(50_000)) == {("a",): 50_000}
        with pytest.raises(ValueError, match=r"t\.csv, line 50002: 2 fields; expected 1"):
            next(texts)

    @pytest.mark.parametrize(
        ("name", "content", "options", "message"),
        [
            ("t.csv", "a,b\n1,2\n", {}, r"which column of .*t\.csv is the text: 'a', 'b'; set text_column"),
            (
                "t.csv",
                "a,b\n1,2\n",
                {"text_column": "c"},
                r"t\.csv has no column 'c'; its columns are 'a', 'b'",
            ),
            ("t.txt", "a\n", {"text_column": "c"}, r"t\.txt has no column 'c'; its columns are 'text'"),
            ("t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', {}, r"t\.jsonl, line 2: no 'text' here"),
            ("t.txt", "", {}, r"t\.txt is empty"),
        ],
    )
    def test_mistake(
        self, name: str, content: str, options: dict[str, str], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            list(iter_texts(write(tmp_path / name, content), **options))

    def test_badly_encoded_stream(self) -> None:
        stream = io.TextIOWrapper(io.BytesIO(b"a\n" * 10_000 + b"\xff\n"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"the input, after line \d+: not valid utf-8"):
            list(iter_texts(stream))
