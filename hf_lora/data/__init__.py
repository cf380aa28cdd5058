"""Files, Hub and saved data sets -> tokenized splits and label names."""

from hf_lora.data.config import DataConfig
from hf_lora.data.prepare import ClassificationData, prepare_data, prepare_test
from hf_lora.data.records import iter_texts
from hf_lora.data.report import DataReport
from hf_lora.data.splits import load_splits

__all__ = [
    "ClassificationData",
    "DataConfig",
    "DataReport",
    "iter_texts",
    "load_splits",
    "prepare_data",
    "prepare_test",
]
