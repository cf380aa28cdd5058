#!/usr/bin/env bash
# Write model_cards/ anew from runs: the demo's, with the pictures of what `inspect` and `sweep` find. Some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
card=model_cards/bbc-news-minilm
bash scripts/demo.sh
.venv/bin/hf-lora inspect --adapter runs/demo --plot "$card-inspect.png"
cp runs/demo/training_curve.png "$card-curve.png"
sed "s|training_curve.png|bbc-news-minilm-curve.png|" runs/demo/README.md > "$card.md"
cat >> "$card.md" <<'CARD'

## Pictures

The updates by block and projection (`hf-lora inspect --adapter runs/demo --plot FILE`):

![Norms and effective ranks](bbc-news-minilm-inspect.png)
CARD
