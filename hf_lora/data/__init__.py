"""Files, folders, tables in memory and Hub data sets -> checked, tokenized splits.

The names are imported when they are first used: `DataConfig` alone must not cost what torch and datasets cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lora.data.config import DataConfig as DataConfig
    from hf_lora.data.prepare import ClassificationData as ClassificationData
    from hf_lora.data.prepare import prepare_data as prepare_data
    from hf_lora.data.prepare import prepare_test as prepare_test
    from hf_lora.data.records import iter_texts as iter_texts
    from hf_lora.data.report import DataReport as DataReport
    from hf_lora.data.splits import load_splits as load_splits

_PLACES = {"DataConfig": "config", "DataReport": "report", "iter_texts": "records", "load_splits": "splits"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES and name not in ("ClassificationData", "prepare_data", "prepare_test"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'prepare')}"), name)
