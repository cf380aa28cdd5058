"""Command-line arguments that several subcommands share. Light: nothing heavy is imported."""

from __future__ import annotations

from typing import Any


def add_adapter(parser: Any) -> None:
    """Which adapter, on which base."""
    parser.add_argument("--adapter", required=True, help="adapter directory or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--base", help="another place of the base model than the one the adapter names")
    parser.add_argument(
        "--skip_base_check",
        action="store_true",
        help="use a base model whose weights differ from those trained on",
    )


def add_labelled_data(parser: Any) -> None:
    """Texts with labels to measure on."""
    parser.add_argument("--test_file", help="file or folder with texts and labels")
    parser.add_argument("--dataset_name", help="Hub data set with a test split, in place of --test_file")
    parser.add_argument("--dataset_config_name", help="configuration of the Hub data set")
    parser.add_argument("--text_column", help="column of the text (default: as in training)")
    parser.add_argument("--text_pair_column", help="column of the second text of a pair")
    parser.add_argument("--label_column", help="column of the label")
    parser.add_argument("--encoding", default="utf-8", help="character encoding of the file (default: utf-8)")
    parser.add_argument("--max_test_samples", type=int, help="use only the first N examples")


def add_speed(parser: Any) -> None:
    """How the classifier runs."""
    parser.add_argument(
        "--batch_size",
        type=int,
        help="texts at a time (default: as many as make 2,048 tokens; 16,384 on a GPU)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the encoder; auto is bf16 where the hardware multiplies it natively, else fp32 (default: auto)",
    )
