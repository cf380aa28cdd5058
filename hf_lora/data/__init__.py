"""Files, folders, tables in memory and Hub data sets -> checked, tokenized splits.

The names are imported when they are first used: `DataConfig` alone must not cost what torch and datasets cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lora.data.config import DataConfig
    from hf_lora.data.prepare import ClassificationData, prepare_data, prepare_test
    from hf_lora.data.records import iter_texts
    from hf_lora.data.report import DataReport
    from hf_lora.data.splits import load_splits

_HOMES = {
    "ClassificationData": "prepare",
    "DataConfig": "config",
    "DataReport": "report",
    "iter_texts": "records",
    "load_splits": "splits",
    "prepare_data": "prepare",
    "prepare_test": "prepare",
}

__all__ = [
    "ClassificationData",
    "DataConfig",
    "DataReport",
    "iter_texts",
    "load_splits",
    "prepare_data",
    "prepare_test",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
