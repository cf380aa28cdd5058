"""Check every model type of the table on a tiny random model: one row each; exits with 1 if any check fails."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import transformers
from architecture_checks import run_checks
from tqdm import tqdm

from hf_lora._files import write_text
from hf_lora.cli.tables import print_table
from hf_lora.lora.architectures import ARCHITECTURES


def main() -> int:
    """Run the checks from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("model_types", nargs="*", help="model types to check; default: all of the table")
    parser.add_argument(
        "--json", metavar="FILE", help="write the rows as a JSON list; -: standard output, no table"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model_types = options.model_types or list(ARCHITECTURES)
    rows = [run_checks(model_type) for model_type in tqdm(model_types, file=sys.stderr, unit=" models")]
    if options.json == "-":
        print(json.dumps(rows, indent=2))
    else:
        columns = ("model type", "roles", "modules", "head", "trainable", "result")
        print_table(
            f"{len(rows)} model types",
            columns,
            [
                (r["model_type"], r["roles"], r["modules"], ", ".join(r["head"]), r["trainable"], _result(r))
                for r in rows
            ],
        )
        if options.json:
            write_text(Path(options.json), json.dumps(rows, indent=2) + "\n")
    failed = [row["model_type"] for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def _result(row: dict) -> str:
    return ("ok" if row["ok"] else "FAILED") + (f": {row['reason']}" if row["reason"] else "")


if __name__ == "__main__":
    sys.exit(main())
