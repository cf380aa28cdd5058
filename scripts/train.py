"""The training entry of `hf-lora train` for launchers: `accelerate launch scripts/train.py [the same arguments]`."""

import sys

from hf_lora.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
