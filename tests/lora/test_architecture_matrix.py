"""Every check for every entry of the table: an entry with a tiny configuration is tested with no new test code."""

import pytest
from architecture_checks import CHECKS, run_checks

from hf_lora.lora.architectures import ARCHITECTURES


def test_the_table_is_long_enough():
    assert len(ARCHITECTURES) >= 45


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_every_check_holds(model_type):
    row = run_checks(model_type)
    assert row["ok"], row["reason"]
    if ARCHITECTURES.get(model_type).reason is None:
        assert set(row["checks"]) == set(CHECKS) and row["modules"] > 0
    # What cannot be compared with peft says why; nothing else is left out.
    skipped = {name for name, outcome in row["checks"].items() if outcome != "ok"}
    assert skipped <= {"peft", "from_peft"}
