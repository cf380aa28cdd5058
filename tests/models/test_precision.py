import pytest
import torch

from hf_lora.models.loading import Precision, choose_precision


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_asked_for_is_chosen(name, dtype):
    precision = choose_precision(name)
    assert (precision.name, precision.dtype) == (name, dtype)
    assert str(precision) == f"precision: {name} (as asked for)"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, Precision("fp32", "this CPU does not multiply bf16 natively")),
        (
            {"avx512_f": True, "avx512_bf16": False},
            Precision("fp32", "this CPU does not multiply bf16 natively"),
        ),
        ({"avx512_bf16": True}, Precision("bf16", "this CPU multiplies bf16 natively: avx512_bf16")),
        (
            {"avx512_bf16": True, "amx_bf16": True},
            Precision("bf16", "this CPU multiplies bf16 natively: amx_bf16"),
        ),
    ],
)
def test_auto_follows_the_instructions_of_the_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_gpu_where_there_is_one(monkeypatch, native, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision().name == name


def test_a_device_without_a_rule_is_fp32():
    assert choose_precision("auto", "mps").name == "fp32"


def test_another_word_is_refused():
    with pytest.raises(
        ValueError, match="precision is not usable; got 'fp16'; expected one of auto, fp32, bf16"
    ):
        choose_precision("fp16")


@pytest.mark.parametrize("given", [{"autocast": True}, {"sharded": True}])
def test_auto_is_fp32_where_something_else_decides(monkeypatch, given):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_precision("auto", "cpu", **given).name == "fp32"
    assert choose_precision("bf16", "cpu", **given).name == "bf16"
