"""LoRA on quantized layers (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): bitsandbytes and torchao.

    y = quantized_base(x) + scaling * B A x

The layer's own forward computes the first term and the factors are fp32. Supported are `Linear8bitLt` and `Linear4bit`
of bitsandbytes, and an `nn.Linear` whose weight torchao quantized ("weight only"). Neither library is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_lora.lora import functional
from hf_lora.lora.head import belongs_to
from hf_lora.lora.layer import LoRALayer, UpdateSpec
from hf_lora.lora.linear import LAYER_TYPES, LoRALinear, ModuleLoRA


class QuantizedLoRA(LoRALinear):
    """A quantized linear layer with a low-rank update, x `(..., in)`, y `(..., out)`. It cannot be merged."""

    @classmethod
    def attach(cls, module: nn.Module, spec: UpdateSpec, weight: Tensor | None = None) -> LoRALayer:
        """As `ModuleLoRA.attach`. Raises ValueError for DoRA, which needs the full weight's norms at every step."""
        if spec.variant.magnitude:
            raise ValueError(
                f"variant='dora' cannot adapt a quantized layer; got a {type(module).__name__}; use variant='lora', "
                "or load the base without quantization"
            )
        return super().attach(module, spec, dequantized(module))

    @property
    def base_weight(self) -> Tensor:
        """The pretrained weight as the layer has it, dequantized: a copy, `(out, in)`."""
        return dequantized(self)

    def effective_weight(self, state: Mapping[str, Any] | None = None) -> Tensor:
        """Raises ValueError: a quantized weight cannot take the update exactly."""
        raise ValueError(
            f"cannot merge into a quantized {self.base_type.__name__}, which would round the update away; "
            "load the base without quantization and the adapter onto it, then merge"
        )

    def forward(self, input: Tensor) -> Tensor:
        """The quantized layer's own forward plus scaling * B A x, in the type of the former."""
        base = self.base_type.forward(self, input)
        if not self.enabled:
            return base
        dropout = self.lora_dropout if self.training else 0.0
        lora_A, lora_B = self.factors()
        return base + functional.lora_update(input, lora_A, lora_B, self.scaling, dropout).to(base.dtype)


class LoRATorchAOLinear(QuantizedLoRA):
    """An `nn.Linear` whose weight torchao quantized."""

    base_type = nn.Linear


def layer_type_of(module: nn.Module) -> type[ModuleLoRA] | None:
    """The adapted type for a module, made if it is one of bitsandbytes; None where the module form does not fit."""
    if _is_torchao(getattr(module, "weight", None)):
        return LoRATorchAOLinear if type(module) is nn.Linear else None
    base_type = type(module)
    if base_type not in LAYER_TYPES and _is_bitsandbytes(module):
        bases = (QuantizedLoRA, base_type)
        made = type(f"LoRA{base_type.__name__}", bases, {"base_type": base_type, "__module__": __name__})
        LAYER_TYPES.register(base_type, made)
    return LAYER_TYPES.get(base_type) if base_type in LAYER_TYPES else None


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds a quantized weight of one of the two libraries."""
    return _is_bitsandbytes(module) or _is_torchao(getattr(module, "weight", None))


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a quantized layer as floating-point numbers `(out, in)`, the ones it computes with."""
    weight: Any = module.weight
    if _is_torchao(weight):
        return weight.detach().dequantize()
    functions = sys.modules["bitsandbytes"].functional
    if getattr(weight, "quant_state", None) is not None:
        return functions.dequantize_4bit(weight.data, weight.quant_state)
    # The scales move from the weight to the layer's state at the first forward.
    state: Any = getattr(module, "state", None)
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else getattr(state, "SCB", None)
    return weight.detach() if scales is None else functions.int8_vectorwise_dequant(weight.data, scales)


def prepare_quantized(model: nn.Module, head: Iterable[str] = ()) -> None:
    """Make a model with quantized layers trainable around them; head: dotted names of modules that are to be trained.

    Raises ValueError if the head is quantized, or if a layer lets no gradient through to those before it.
    """
    head = tuple(head)
    quantized = {name: module for name, module in model.named_modules() if is_quantized(module)}
    for name, module in quantized.items():
        if belongs_to(name, head):
            raise ValueError(
                f"cannot train a quantized head; got a quantized {name!r}; quantize the model without it, as with "
                f"BitsAndBytesConfig(llm_int8_skip_modules=[{name!r}]) or TorchAoConfig(modules_to_not_convert=[...])"
            )
        if not _passes_gradient(module):
            raise ValueError(
                f"cannot train through {name!r}; got a quantization of the activations, which has no gradient; "
                "expected a weight-only quantization, such as torchao's Int8WeightOnlyConfig"
            )
    for module in quantized.values():
        _keep_unpacked(module)


def _is_bitsandbytes(module: nn.Module) -> bool:
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear8bitLt | library.nn.Linear4bit)


def _is_torchao(weight: object) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def _passes_gradient(module: nn.Module) -> bool:
    weight = cast(Tensor, module.weight)
    if not _is_torchao(weight) or weight.ndim != 2:
        return True
    with torch.enable_grad():
        x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        result = nn.functional.linear(x, weight.detach())
    return result.requires_grad


def _keep_unpacked(module: nn.Module) -> None:
    """Keep a `Linear4bit` on a CPU from repacking its weight at evaluation: the packed layout has no backward."""
    layer: Any = module
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return
    layer.support_avx512bf16_for_cpu = False
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        unpack = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
        layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)
