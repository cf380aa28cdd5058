"""The two forms of an adapted weight: a layer with a forward of its own, and a parametrized tensor.

A layer is adapted where it stands: its class changes to a subclass of its own and the factors are added. So
`state_dict` keys, hooks, `weight`, references from elsewhere and `isinstance` go on as before, and `detach` gives
back exactly the layer that was. Everything else, such as a convolution or a bare parameter, is parametrized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hf_lora._choices import Registry
from hf_lora.lora import functional
from hf_lora.lora.config import FACTORS
from hf_lora.lora.layer import Layout, LoRALayer, UpdateSpec, layout_of


class ModuleLoRA(LoRALayer):
    """The module form: the adapted layer itself. Subclass it together with the layer it adapts."""

    base_type: type[nn.Module]
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def attach(cls, module: nn.Module, spec: UpdateSpec, weight: Tensor | None = None) -> LoRALayer:
        """Turn `module`, of type `cls.base_type`, into an adapted layer in place; returns it.

        weight: the frozen matrix, where the layer does not hold it as a floating-point tensor.
        """
        weight = cast(Tensor, module.weight) if weight is None else weight
        shape, layout, base_type = cls.shape_of(module), layout_of(module), type(module)
        module.__class__ = cls
        layer = cast(LoRALayer, module)
        try:
            layer.add_update(weight, spec, layout, shape)
        except BaseException:
            module.__class__ = base_type
            raise
        return layer

    def detach(self) -> None:
        for name in LoRALayer.__annotations__:
            if hasattr(self, name):
                delattr(self, name)
        self.__class__ = self.base_type  # type: ignore[assignment]

    @staticmethod
    def shape_of(module: nn.Module) -> torch.Size:
        """The shape of the weight, from the layer's own numbers: under ZeRO-3 the tensor is empty."""
        raise NotImplementedError

    @property
    def frozen_weight(self) -> Tensor:
        return self.weight

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own forward with another weight."""
        return nn.functional.linear(x, self.layout.to_matrix(weight), self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """W' x + b; the pretrained layer while disabled, and at its cost while merged."""
        if not self.enabled:
            return self.product(input, self.base_weight)
        if self.merged:
            return self.product(input, self.weight)
        dropout = self.lora_dropout if self.training else 0.0
        weight = self.layout.to_matrix(self.weight)
        lora_A, lora_B = self.factors()
        update = (lora_A, lora_B, self.scaling, dropout)
        if self.lora_magnitude is None:
            return functional.lora_linear(input, weight, self.bias, *update)
        return functional.dora_linear(input, weight, self.bias, *update, self.lora_magnitude)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


class LoRALinear(ModuleLoRA, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a low-rank update: y = W x + b + scaling * B A x, x `(..., in)`, y `(..., out)`."""

    base_type = nn.Linear

    @staticmethod
    def shape_of(module: nn.Module) -> torch.Size:
        return torch.Size((cast(nn.Linear, module).out_features, cast(nn.Linear, module).in_features))


class LoRAConv1D(ModuleLoRA, Conv1D):
    """transformers' `Conv1D` (GPT-2), a linear layer whose weight is `(in, out)`."""

    base_type = Conv1D

    @staticmethod
    def shape_of(module: nn.Module) -> torch.Size:
        return torch.Size((cast(int, module.nx), cast(int, module.nf)))

    def __repr__(self) -> str:
        return f"LoRAConv1D(nf={self.nf}, nx={self.nx}, rank={self.rank}, scaling={self.scaling:g})"


class LoRAFalconLinear(LoRALinear, FalconLinear):
    """Falcon's linear layer, which is `nn.Linear` with another order of rounding in half precision."""

    base_type = FalconLinear

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        result = x @ weight.T
        return result if self.bias is None else result + self.bias


LAYER_TYPES: Registry[type[nn.Module], type[ModuleLoRA]] = Registry("layer type")
for _type in (LoRALinear, LoRAConv1D, LoRAFalconLinear):
    LAYER_TYPES.register(_type.base_type, _type)


class LoRAParametrization(LoRALayer):
    """W' for the tensor called `tensor` of a module, registered with `parametrize`.

    Dropout drops the same inputs of A for the whole batch: in weight space there are no tokens. Raises ValueError if
    the tensor is not a floating-point parameter of at least two dimensions.
    """

    def __init__(self, module: nn.Module, tensor: str, spec: UpdateSpec) -> None:
        super().__init__()
        weight = getattr(module, tensor, None)
        if not is_adaptable(weight):
            raise ValueError(
                f"cannot adapt {tensor!r} of a {type(module).__name__}; got {_described(weight)}; "
                "expected a floating-point parameter of at least two dimensions"
            )
        # In a tuple, since a module must not be registered inside its own part.
        self._owner = (module,)
        self.tensor = tensor
        layout = layout_of(module) if tensor == "weight" else Layout(transposed=spec.input_first)
        self.add_update(weight, spec, layout, weight.shape, groups=getattr(module, "groups", 1))

    @classmethod
    def attach(cls, module: nn.Module, tensor: str, spec: UpdateSpec) -> LoRAParametrization:
        """Adapt one tensor of a module in place; returns the parametrization."""
        parametrization = cls(module, tensor, spec)
        required_grad = getattr(module, tensor).requires_grad
        parametrize.register_parametrization(module, tensor, parametrization)
        parametrization.frozen_weight.requires_grad_(required_grad)
        return parametrization

    def detach(self) -> None:
        module = self._owner[0]
        # Copies of a module share the class that torch made for it, and lose its property with the original.
        made = type(module)
        module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        parametrize.remove_parametrizations(module, self.tensor, leave_parametrized=False)

    @property
    def frozen_weight(self) -> Tensor:
        parametrizations = cast(nn.ModuleDict, self._owner[0].parametrizations)
        return cast(Tensor, parametrizations[self.tensor].original)

    def forward(self, weight: Tensor) -> Tensor:
        """W' for the frozen W."""
        if not self.enabled:
            return self.base_weight
        if self.merged:
            return weight
        lora_A, lora_B = self.factors()
        if self.training and self.lora_dropout > 0.0:
            lora_A = lora_A * F.dropout(torch.ones_like(lora_A[0]), self.lora_dropout)
        delta = functional.delta_weight(lora_A, lora_B, self.scaling)
        return self.adapted(weight, delta, self.lora_magnitude)

    def extra_repr(self) -> str:
        return f"{self.tensor}, rank={self.rank}, scaling={self.scaling:g}"


@torch.no_grad()
def check_loaded(layer: LoRALayer, state: Mapping[str, Tensor | None], name: str) -> None:
    """Refuse values for the "weight" and the factors of a layer that hold its update in the weight.

    Raises ValueError for the weight W' that the given factors make of the layer's own, and for another weight than the
    layer's own without factors: a merged one, or that of another model.
    """
    weight, base = state.get("weight"), layer.base_weight
    if weight is None or weight.shape != base.shape or type(layer.frozen_weight) is not nn.Parameter:
        return
    weight = weight.to(base)
    if torch.equal(weight, base):
        return
    factors = {
        factor: tensor.to(base.device) for factor in FACTORS if (tensor := state.get(factor)) is not None
    }
    if not factors:
        raise ValueError(
            f"cannot load a plain model's weights under an adapter for others; got another {name!r}; load what "
            "save_pretrained or a stock Trainer wrote with from_pretrained, and resume with LoRATrainer"
        )
    if any(tensor.shape != getattr(layer, factor).shape for factor, tensor in factors.items()):
        return  # torch names the shapes
    own = {factor: getattr(layer, factor) for factor in FACTORS}
    merged = layer.effective_weight({"weight": base, **own, **factors})
    if torch.dist(weight, merged) < 0.01 * torch.dist(weight, base):
        raise ValueError(
            f"cannot load weights of a merged model; got {name!r} with its update in it; expected unmerged ones; call "
            "unmerge_lora before state_dict"
        )


def is_adaptable(weight: object) -> TypeGuard[nn.Parameter]:
    """Whether a low-rank update fits a tensor: a floating-point parameter of at least two dimensions."""
    if not isinstance(weight, nn.Parameter) or type(weight).__module__.startswith("torchao"):
        return False  # torchao's quantized tensors call themselves floating-point and cannot be added to
    return weight.ndim >= 2 and weight.is_floating_point()


def _described(weight: object) -> str:
    return f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
