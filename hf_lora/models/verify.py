"""Check on a small batch that every adapted layer acts on the output."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from hf_lora.lora.inject import injection, lora_layers
from hf_lora.lora.layer import LoRALayer
from hf_lora.tasks import task_of

LENGTH = 8
_B_STD = 0.02
_CHARACTERS = 0xD800
# The second probe of a suspect looks for gradients that fp16 rounded to zero.
_STRONGER = 4096.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after, each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected; 0 where both are zero."""
    got, expected = got.cpu().double(), expected.cpu().double()
    distance = float((got - expected).norm())
    return distance if distance == 0 else distance / max(float(expected.norm()), 1e-30)


@dataclass(frozen=True)
class VerificationReport:
    """What the probe measured. Where a layer does not act there is an error and no report."""

    layers: int
    """How many are adapted."""
    unused: tuple[str, ...] = ()
    """Those that the model does not use, with `allow_unused`."""

    def __str__(self) -> str:
        unused = f"; the model does not use {', '.join(self.unused)}" if self.unused else ""
        acting = self.layers - len(self.unused)
        return f"verified: {acting} of {self.layers} adapted layers act on the output{unused}"


def verify_injection(
    model: nn.Module, batch: Mapping[str, Any], *, allow_unused: bool = False
) -> VerificationReport:
    """Check on one small batch that every adapted layer moves the output and gets a gradient.

    batch: what the model takes, such as `probe_batch(model)`: input_ids `(batch, length)` and labels.
    allow_unused: report, and do not refuse, layers whose pretrained weight has no effect either, as in the last block
        of Longformer, LUKE or LiLT.
    The model is afterwards as it was, bit for bit: weights, gradients, buffers, modes and random state.
    Raises ValueError for a layer without effect, with the reason; for a model without LoRA, or merged or disabled; for
    logits that are not finite.
    """
    layers = lora_layers(model)
    if wrong := [name for name, layer in layers.items() if layer.merged or not layer.enabled]:
        raise ValueError(
            f"cannot verify a merged or disabled adapter; got {len(wrong)} such layers, first {wrong[0]!r}; "
            "call unmerge_lora first, or verify outside lora_disabled"
        )
    batch = _on_device(batch, next(iter(layers.values())).lora_B.device)
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cuda), evaluating(model):
        problems = _probe(model, layers, batch)
    unused = tuple(problems.pop("unused", ())) if allow_unused else ()
    if len(unused) == len(layers):
        problems["unused"] = list(unused)
    if problems:
        found = "; ".join(f"no effect at {', '.join(dead)}: {_REASONS[k]}" for k, dead in problems.items())
        count = sum(map(len, problems.values()))
        raise ValueError(f"the adapter has {found}; got {count} such layers of {len(layers)}, expected none")
    return VerificationReport(len(layers), unused)


_REASONS = {
    "bypassed": "the model reads the weight of these layers and goes around their forward, as nn.MultiheadAttention "
    "does with out_proj; try form='parametrization', or leave them out of target_modules",
    "unused": "the model does not use these layers: nothing they compute reaches the logits, or without a gradient; "
    "try other target_modules or layers",
    "parts": "the model does not use these parts of the fused weights; leave their roles out of projections",
    "evaluation": "these layers act in training only, since in evaluation a fused kernel goes around them; "
    "try form='parametrization', or leave them out of target_modules",
}


# Why one backward pass finds every dead layer: let f be a random projection of the logits. f is analytic in all A and
# B together, as matrix products, softmax, layer norms and GELU are. If it depends on a B at all, its gradient there is
# zero on a set of measure zero only, which random A and B miss. If not (the layer is not called, or its output is
# dropped, detached or multiplied by zero), the gradient is exactly zero or None. ReLU is analytic in pieces only and
# fp16 flushes small numbers to zero, so a suspect is probed again elsewhere with a larger projection.
def _probe(model: nn.Module, layers: Mapping[str, LoRALayer], batch: dict[str, Any]) -> dict[str, list[str]]:
    """The layers without effect, by the kind of `_REASONS`."""
    acting, read, called = _acting(model, layers, batch, ())
    suspects = [name for name, acts in acting.items() if not all(acts)]
    if suspects:
        again, read, more = _acting(model, layers, batch, suspects)
        called |= more
        for name in suspects:
            acting[name] = [first or second for first, second in zip(acting[name], again[name], strict=True)]
    # Fused kernels (nn.TransformerEncoderLayer in evaluation) go around a forward only where no gradients
    # are taken: such a layer would be trained and then ignored.
    with torch.no_grad(), _recorded(layers) as called_without_gradients:
        functional_call(model, _buffers(model), (), batch)
    problems: dict[str, list[str]] = {}
    for name, acts in acting.items():
        if not any(acts):
            bypassed = read.get(name, id(layers[name]) not in called)
            problems.setdefault("bypassed" if bypassed else "unused", []).append(name)
        elif not all(acts):
            numbers = ", ".join(str(number) for number, act in enumerate(acts, 1) if not act)
            problems.setdefault("parts", []).append(f"{name} (part {numbers} of {len(acts)})")
        elif id(layers[name]) in called - called_without_gradients:
            problems.setdefault("evaluation", []).append(name)
    return problems


def _acting(
    model: nn.Module, layers: Mapping[str, LoRALayer], batch: dict[str, Any], suspects: Collection[str]
) -> tuple[dict[str, list[bool]], dict[str, bool], set[int]]:
    """Whether a random projection of the logits has a gradient by each part of each B, and by a suspect's weight.

    And the ids of the layers whose forward was called. Quantized weights get no gradient and are left out.
    """
    generator = torch.Generator().manual_seed(1 if suspects else 0)
    tensors, factors, weights = _buffers(model), dict[str, Tensor](), dict[str, Tensor]()
    tied: dict[int, Tensor] = {}
    for placement, (name, layer) in zip(injection(model).placements, layers.items(), strict=True):
        for factor, std in (("lora_A", 1 / math.sqrt(layer.lora_A[0].numel())), ("lora_B", _B_STD)):
            own = getattr(layer, factor)
            factors[name] = (std * torch.randn(own.shape, generator=generator)).to(own).requires_grad_()
            tensors[f"{placement.layer}.{factor}".lstrip(".")] = factors[name]
        weight = layer.frozen_weight
        if name in suspects and type(weight) is nn.Parameter:
            weights[name] = tied.setdefault(id(weight), weight.detach().requires_grad_())
            tensors[placement.weight] = weights[name]
    with torch.enable_grad(), _recorded(layers) as called:
        logits = _logits(functional_call(model, tensors, (), batch))
    if not logits.isfinite().all():
        hint = "try another batch, or a base in bf16 or fp32"
        raise ValueError(f"cannot verify the adapter; got {logits.dtype} logits that are not finite; {hint}")
    wanted = [*factors.values(), *weights.values()]
    gradients: Iterable[Tensor | None] = [None] * len(wanted)
    if logits.requires_grad:
        projection = torch.randn(logits.shape, generator=generator).to(logits)
        projection *= _STRONGER if suspects else 1.0
        gradients = torch.autograd.grad(logits, wanted, projection, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True)]
    acting = {}
    for (name, layer), gradient in zip(layers.items(), found, strict=False):
        rows = [len(gradient)] if layer.parts is None else [len(part) for part in layer.parts]
        acting[name] = [bool(((part != 0) & part.isfinite()).any()) for part in gradient.split(rows)]
    read = {name: bool(gradient.any()) for name, gradient in zip(weights, found[len(layers) :], strict=True)}
    return acting, read, called


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies, for a forward that may change them."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _logits(output: Any) -> Tensor:
    """The logits of a model's output; of an output without, its first floating-point tensor."""
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    parts = output.values() if isinstance(output, Mapping) else output
    for part in [parts] if isinstance(parts, Tensor) else parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ValueError(
        f"cannot verify the adapter; got {type(output).__name__}; expected an output with logits"
    )


@contextmanager
def _recorded(layers: Mapping[str, LoRALayer]) -> Iterator[set[int]]:
    """Inside, collects the ids of the layers whose forward is called."""
    wanted, called = {id(layer) for layer in layers.values()}, set[int]()
    # A global hook: torch's fused kernels step aside for a module that has hooks of its own.
    with register_module_forward_hook(
        lambda module, *_: called.add(id(module)) if id(module) in wanted else None
    ):
        yield called


def _on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def probe_batch(model: nn.Module, tokenizer: Any = None) -> dict[str, Tensor]:
    """Two short sequences of different tokens, or two noisy images, with labels: for `verify_injection`.

    Returns input_ids and attention_mask `(2, length)`, or pixel_values `(2, channels, height, width)`, and labels for
    the configuration's problem type, on the device of the model.
    tokenizer: names the special tokens where the configuration does not.
    Raises ValueError for models of neither text nor images.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if config is None or kind not in ("input_ids", "pixel_values"):
        raise ValueError(
            f"cannot make a batch for a {type(model).__name__}; got the main input {kind!r}; expected input_ids or "
            "pixel_values; pass a batch of your own to verify_injection"
        )
    device = next(model.parameters()).device
    task = task_of(getattr(config, "problem_type", None), config.num_labels)
    inputs = _images(config) if kind == "pixel_values" else _tokens(config, tokenizer)
    return _on_device({**inputs, "labels": task.sample_labels(config.num_labels)}, device)


def _tokens(config: Any, tokenizer: Any) -> dict[str, Tensor]:
    named: dict[str, int] = {}
    for name in ("pad", "unk", "mask", "bos", "cls", "sep", "eos", "decoder_start"):
        for source in (config, tokenizer):
            value = getattr(source, f"{name}_token_id", None)
            if value is not None:
                named[name] = int(value[0] if isinstance(value, list | tuple) else value)
    special = {*named.values(), *getattr(tokenizer, "all_special_ids", ())}
    # All tokens differ: among equal keys and values, attention does not depend on the queries.
    # CANINE has no table of tokens, and takes any character.
    size = getattr(config.get_text_config(), "vocab_size", _CHARACTERS)
    usable = [index for index in range(size) if index not in special]
    step = max(1, len(usable) // (2 * LENGTH))
    ids = torch.tensor([usable[index * step % len(usable)] for index in range(2 * LENGTH)]).reshape(2, LENGTH)
    first, last = named.get("cls", named.get("bos")), named.get("eos", named.get("sep"))
    if first is not None and first != last:
        ids[:, 0] = first
    if last is not None:
        ids[:, -1] = last  # where BART and T5 read their class
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(config: Any) -> dict[str, Tensor]:
    size, channels = config.image_size, getattr(config, "num_channels", 3)
    sides = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0))}
