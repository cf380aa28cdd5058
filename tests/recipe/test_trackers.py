"""What trackers get of a run: the LoRA settings, and the F1 of every class."""

import json
from pathlib import Path

import pytest
from conftest import LABELS
from helpers_recipe import run_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.slow
def test_tensorboard_has_lora_settings_and_metrics_by_class(
    tiny_bert_dir: Path, tiny_csv: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    settings = {
        "model_name_or_path": tiny_bert_dir,
        "train_file": tiny_csv,
        "output_dir": tmp_path / "run",
        "max_seq_length": 32,
        "lora_rank": 3,
        "lora_projections": "qv",
        "num_train_epochs": 2,
        "head_init": "random",
        "report_to": "tensorboard",
        "disable_tqdm": True,
    }
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    metrics = run_training([*argv, "--use_cpu"])
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    arguments = json.loads(b"".join(events.Tensors("args/text_summary")[0].tensor_proto.string_val).decode())
    assert arguments["lora"]["rank"] == 3 and arguments["lora"]["projections"] == "qv"
    scalars = set(events.Tags()["scalars"])
    for label in LABELS:
        name = f"eval/class_f1_{label}"
        assert name in scalars
        assert abs(events.Scalars(name)[-1].value - metrics[f"eval_class_f1_{label}"]) < 1e-6
    by_class = [metrics[f"eval_class_f1_{label}"] for label in LABELS]
    assert abs(sum(by_class) / len(by_class) - metrics["eval_f1_macro"]) < 1e-6
    # They are for plots; the card and the tables have their own.
    assert "class_f1" not in (tmp_path / "run" / "README.md").read_text()
