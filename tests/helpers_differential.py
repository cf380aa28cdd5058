"""Random adapters for comparison with peft: model type, options and maker are drawn from one number."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import peft
import safetensors.torch
import torch
from tiny_models import TEXT, VISION, tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from hf_lora import LoRAConfig, inject_lora
from hf_lora.lora.architectures import ARCHITECTURES, ROLES
from hf_lora.lora.config import SCALINGS, VARIANTS
from hf_lora.lora.head import belongs_to, find_head

# Half of the cases are of these: heads of several layers, tied embeddings, fused, shared, grouped and bare weights.
FOCUS = (
    *("albert", "bart", "bert", "bigbird_pegasus", "deberta", "deberta-v2", "distilbert", "gpt2", "llama"),
    *("modernbert", "modernbert-decoder", "roberta", "squeezebert", "t5", "vit", "xlnet"),
)
OTHERS = sorted(name for name in {**TEXT, **VISION} if ARCHITECTURES.get(name).reason is None)
# How the files of one and the same adapter look: as written today, by older releases, and as a state dict.
FORMS = ("today", "peft 0.10", "peft 0.5", "nested names")


@dataclass
class Case:
    """What the number `seed` draws: a model type, its inputs, and a source of more random choices."""

    seed: int
    random: Random = field(init=False)
    model_type: str = field(init=False)
    inputs: dict[str, Tensor] = field(init=False)
    dtype: torch.dtype = field(init=False)
    saved: list[str] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.model_type = self.random.choice(FOCUS if self.random.random() < 0.5 else OTHERS)
        half = self.random.random() < 0.1
        self.dtype = torch.bfloat16 if half else torch.float32
        self.inputs = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in tiny_inputs(self.model_type).items()
            if name != "labels"
        }

    def plain(self) -> Any:
        """The base model, the same at every call."""
        return tiny_model(self.model_type).to(self.dtype)

    def logits(self, model: nn.Module) -> Tensor:
        """The outputs of a model on the case's inputs, in fp32."""
        with torch.no_grad():
            return model(**self.inputs).logits.float()

    def assert_close(self, model: nn.Module, expected: Tensor) -> None:
        """Compare a model's logits: to 1e-4, or by their norm where the base is in half precision."""
        given = self.logits(model)
        if self.dtype == torch.float32:
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
        else:
            error = torch.linalg.vector_norm(given - expected) / torch.linalg.vector_norm(expected)
            assert error < 0.1, f"relative error {error:.3f}"

    def ours(self) -> nn.Module:
        """A base model with a random adapter of hf_lora, trained."""
        for _ in range(50):
            model = self.plain()
            try:
                inject_lora(model, LoRAConfig(**self._options(model)), head=self._head(model))
            except ValueError as error:
                assert "\n" not in str(error)
                continue
            return self._trained(model)
        raise AssertionError("no usable options in 50 tries")

    def theirs(self) -> Any:
        """A base model with a random adapter of peft, trained."""
        for _ in range(50):
            model = self.plain()
            try:
                config = peft.LoraConfig(**self._peft_options(model))
                self.saved = config.modules_to_save
                wrapped = peft.get_peft_model(model, config)
            except (AttributeError, NotImplementedError, TypeError, ValueError):
                continue
            return self._trained(wrapped)
        raise AssertionError("no usable options in 50 tries")

    def saves_twice(self, model: nn.Module) -> bool:
        """Whether peft's `modules_to_save` names a module of a plain model and another inside it."""
        ends = tuple(self.saved or ())
        names = [name for name, _ in model.named_modules() if ends and name.endswith(ends)]
        return any(belongs_to(name.rpartition(".")[0], names) for name in names)

    def _head(self, model: nn.Module) -> list[str] | None:
        """None for the usual head, or with a norm of the encoder too, which is then trained and saved whole."""
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        norms = [name for name in norms if not belongs_to(name, find_head(model))]
        chosen = self.random.random() < 0.15 and norms
        return [*find_head(model), self.random.choice(norms)] if chosen else None

    def _trained(self, model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    std = 0.2 if ".lora_" in name or "lora_embedding" in name else 0.05
                    parameter.add_(std * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    def _options(self, model: nn.Module) -> dict[str, Any]:
        pick = self.random.choice
        options = {
            **self._numbers(),
            "dropout": pick([0.0, 0.1]),
            "bias": pick(["none", "none", "lora_only", "all"]),
            "variant": pick(list(VARIANTS)),
            "scaling": pick(list(SCALINGS)),
            "form": pick(["module", "module", "parametrization"]),
            "init": pick(["kaiming", "gaussian", "normal", "orthogonal", "gradient", "pissa", "olora"]),
            "layers": pick([None, None, None, [0], [-1]]),
            "train_head": pick([True, True, False]),
        }
        roles = [role for role in ROLES if ARCHITECTURES.get(self.model_type).projections(role)]
        if pick([True, False]):
            return options | {
                "projections": "".join(self.random.sample(roles, pick(range(1, 1 + len(roles)))))
            }
        return options | {"target_modules": self._targets(model)}

    def _peft_options(self, model: nn.Module) -> dict[str, Any]:
        pick, numbers = self.random.choice, self._numbers()
        modules = [name.rpartition(".")[2] for name, _ in _adaptable(model, self.inputs)]
        norms = [
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.LayerNorm)
        ]
        head = list(find_head(model))
        return {
            "r": numbers.pop("rank"),
            "lora_alpha": numbers.pop("alpha"),
            **numbers,
            "lora_dropout": pick([0.0, 0.1]),
            "target_modules": self._targets(model),
            "exclude_modules": pick([None, None, r".*\.0\..*", [pick(modules)]]),
            "layers_to_transform": pick([None, None, None, [0]]),
            "bias": pick(["none", "none", "lora_only", "all"]),
            "use_dora": pick([False, False, True]),
            "use_rslora": pick([False, True]),
            "init_lora_weights": pick([True, False, "gaussian", "orthogonal"]),
            "task_type": pick(["SEQ_CLS", "SEQ_CLS", None]),
            "modules_to_save": pick([None, None, head, head[-1:], [*head, *norms[:1]]]),
        }

    def _numbers(self) -> dict[str, Any]:
        pick = self.random.choice
        pattern = pick(["query", ".*0.*", r".*\.1\..*", "(q|k|q_proj|o_proj)"])
        return {
            "rank": pick([1, 2, 4, 6]),
            "alpha": pick([1, 3, 4.5, 16]),
            "rank_pattern": pick([{}, {}, {pattern: 2}]),
            "alpha_pattern": pick([{}, {}, {pattern: 5}]),
        }

    def _targets(self, model: nn.Module) -> Any:
        """Suffixes of names, an expression, or all-linear; tables of embeddings are among them."""
        modules = _adaptable(model, self.inputs)
        names = [name for name, _ in modules]
        tables = [name for name, module in modules if isinstance(module, nn.Embedding)]
        parts = self.random.choice([1, 2])
        suffix = {name: ".".join(name.split(".")[-parts:]) for name in names}
        chosen = self.random.sample(names, min(len(names), self.random.choice([1, 2, 3])))
        kind = self.random.random()
        if kind < 0.1:
            return "all-linear"
        if kind < 0.25:
            return rf".*\.({'|'.join(name.rpartition('.')[2] for name in chosen)})"
        if kind < 0.5 and tables:
            chosen.append(self.random.choice(tables))
        return sorted({suffix[name] for name in chosen})


ADAPTED_BY_PEFT = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)


def _adaptable(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[str, nn.Module]]:
    """The modules outside the head that peft can adapt, by name.

    peft acts only where a module is called, mixes the groups of a convolution, and knows no subclass of an embedding.
    """
    called: set[int] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(id(module))) for module in model.modules()
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in ADAPTED_BY_PEFT and getattr(module, "groups", 1) == 1
        if id(module) in called and not belongs_to(name, find_head(model))
    ]


def numbered_tokenizer() -> PreTrainedTokenizerFast:
    """Words "5" to "63" to their numbers, with the special tokens that the tiny models have."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: index for index, word in enumerate([*special, *map(str, range(5, 64))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = dict(
        zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True)
    )
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def in_older_form(directory: Path, form: str) -> None:
    """Rewrite an adapter of peft as an older release wrote it, which holds the same."""
    if form == "today":
        return
    config_path, tensors_path = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), safetensors.torch.load_file(tensors_path)
    if form == "nested names":
        tensors = {
            key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
            for key, tensor in tensors.items()
        }
        tensors = {
            key.replace("magnitude_vector", "magnitude_vector.default.weight"): t
            for key, t in tensors.items()
        }
    elif config["task_type"] == "SEQ_CLS":
        # It kept the names that the task adds to itself.
        config["modules_to_save"] = sorted({*config["modules_to_save"]} - {"classifier", "score"}) or None
    if form == "peft 0.5":
        tensors = {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}
    config_path.write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, tensors_path, metadata={"format": "pt"})


def tied_targets(model: nn.Module, targets: list[str]) -> bool:
    """Whether an adapted weight has a second name in the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    return any(belongs_to(name, targets) for group in shared for name in group)
