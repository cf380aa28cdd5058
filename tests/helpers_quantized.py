"""Layers and tiny classifiers quantized by bitsandbytes and torchao, where they are installed."""

import pytest
import torch
from conftest import randomize, tiny_classifier
from torch import nn

from hf_lora import LoRAConfig, inject_lora
from hf_lora.lora.quantized import dequantized, is_quantized


def injected(model, **options):
    inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 6, **options}))
    randomize(model)
    return model


def bitsandbytes_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def bitsandbytes_4bit(linear, quant_type="nf4"):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type=quant_type)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def bitsandbytes_fp4(linear):
    return bitsandbytes_4bit(linear, "fp4")


def torchao_with(name, **options):
    def convert(linear):
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        holder = nn.Sequential(linear)
        quantization.quantize_(holder, getattr(quantization, name)(**options))
        return holder[0]

    return convert


KINDS = {
    "bitsandbytes int8": bitsandbytes_8bit,
    "bitsandbytes nf4": bitsandbytes_4bit,
    "bitsandbytes fp4": bitsandbytes_fp4,
    "torchao int8": torchao_with("Int8WeightOnlyConfig"),
    "torchao intx, int8": torchao_with("IntxWeightOnlyConfig"),
    "torchao intx, int4": torchao_with("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": torchao_with("Float8WeightOnlyConfig"),
}
# Against the dequantized weights in fp32; int8 rounds the inputs in evaluation too.
ERRORS = {"bitsandbytes int8": 2e-2}


def quantized(kind, model=None, skip=("classifier",)):
    """The tiny classifier with every linear layer outside `skip` quantized."""
    model = tiny_classifier() if model is None else model
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.startswith(skip):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, KINDS[kind](module))
    return model


def dense_twin(model):
    """The same model with each quantized weight replaced by the numbers that it stands for."""
    twin = tiny_classifier()
    for name, module in model.named_modules():
        if is_quantized(module):
            twin.get_submodule(name).weight.data.copy_(dequantized(module))
    return twin
