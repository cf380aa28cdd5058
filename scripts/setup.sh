# Sourced by demo.sh and test.sh: make .venv and install the package with the tested versions.
# Quick when nothing has changed: the stamp holds a digest of what the installation depends on.
PYTHON="${PYTHON:-python3}"
EXTRAS="${EXTRAS:-dev}"
wanted="$(cat pyproject.toml constraints.txt | cksum)"
stamp=".venv/.hf_lora_${EXTRAS}"
# The development set-up holds the demo's.
if [ -f .venv/.hf_lora_dev ] && [ "$(cat .venv/.hf_lora_dev)" = "$wanted" ]; then
    stamp=".venv/.hf_lora_dev"
fi
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -m venv .venv
fi
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing hf_lora[$EXTRAS] into .venv (once)"
    # torch first and pinned: packages that only ask for "torch" would bring another build.
    .venv/bin/pip install --quiet --constraint constraints.txt torch
    .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[$EXTRAS]"
    echo "$wanted" > "$stamp"
fi
