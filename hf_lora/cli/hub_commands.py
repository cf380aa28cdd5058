"""What `hf-lora push` does, taking the parsed options."""

from __future__ import annotations

import argparse
import json

from huggingface_hub.utils import disable_progress_bars

from hf_lora._text import printable
from hf_lora.adapters.hub import checked_contents, push_contents
from hf_lora.cli.tables import print_table


def push(options: argparse.Namespace) -> int:
    """Push an adapter directory to the Hub, and say what was sent where."""
    disable_progress_bars()
    contents = checked_contents(options.adapter)
    pushed = push_contents(
        contents,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
    )
    if options.json:
        report = {
            "repo_id": pushed.repo_id,
            "revision": pushed.revision,
            "url": pushed.url,
            "commit": pushed.commit.oid,
            "pull_request": pushed.commit.pr_url,
            "changed": bool(pushed.files),
            "files": dict(pushed.files),
        }
        print(json.dumps(report))
        return 0
    if not pushed.files:
        print(printable(f"nothing to push: {pushed.repo_id} has these {len(contents)} files already"))
    else:
        print_table(f"pushed to {pushed.repo_id}", ("file", "bytes"), list(pushed.files.items()))
    print(printable(pushed.url))
    return 0
