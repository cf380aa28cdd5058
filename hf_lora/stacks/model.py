"""One encoder with the updates of many adapters, and the head of each on its own rows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.lora.head import base_prefix, belongs_to
from hf_lora.stacks.batch import Batch, running
from hf_lora.stacks.contents import Contents, not_sharable
from hf_lora.stacks.layers import ReplacedModule, StackedLinear, replaced_module, stacked_linear

# The slot of no adapter: rows with it have the encoder as it was pretrained.
NONE = 0


class StackedModel:
    """A classifier's encoder, its adapters in slots, and heads of several kinds on one pass of it.

    model: a plain classifier, whose encoder is taken over. inputs: a few sequences for it, of which no other size in
    the model is a multiple of their number. Slots are counted from 1; `reserve` makes room.
    A kind is whatever tells heads of different classes apart. Adapters of one kind may have any number of labels.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.prefix = base_prefix(model)
        self.encoder: nn.Module = model.get_submodule(self.prefix)
        self.heads: dict[str, nn.Module] = {}
        self.slots, self.rank = 1, 1
        self._linear: dict[str, StackedLinear] = {}
        self._replaced: dict[str, ReplacedModule] = {}
        self._kinds: dict[int, str] = {}
        # Of each kind, what its classifier gives to the encoder, and the first kind that gives the same.
        self._given: dict[str, dict[str, Tensor]] = {}
        self._first: dict[str, str] = {}
        with torch.no_grad(), _calls(model) as shapes:
            model(**inputs)
        count = len(inputs["input_ids"])
        self._dimensions = {name: _dimension(found, count) for name, found in shapes.items()}

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return next(self.encoder.parameters()).device

    def add_kind(self, kind: str, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Make heads of a kind usable. model: a classifier of it, of which all but the encoder is copied."""
        encoder = model.get_submodule(self.prefix)
        shared = _SharedEncoder(self.encoder)
        with torch.no_grad(), _calls(model) as shapes, _tensors_given(encoder) as given:
            model(**inputs)
        head = copy.deepcopy(model, {id(encoder): shared}).requires_grad_(False).eval()
        for name, found in shapes.items():
            if not belongs_to(name, [self.prefix]):
                self._dimensions.setdefault(name, _dimension(found, len(inputs["input_ids"])))
        self.heads[kind], self._given[kind] = head, given
        self._first[kind] = next(first for first, own in self._given.items() if _equal(own, given))

    def check(self, contents: Contents) -> None:
        """Raise ValueError, by name, for modules that the model calls with anything but one input a sequence."""
        names = [*contents.updates, *contents.modules]
        unusable = [name for name in names if self._dimensions.get(name) is None]
        if unusable:
            got = f"{len(unusable)} modules that do not map sequences to sequences in every call"
            raise not_sharable(f"{got}, first {unusable[0]!r}", "such that do")

    def bytes_of(self, slots: int, contents: Contents | None = None) -> int:
        """The bytes of the stacks with so many slots, once an adapter with these contents has one."""
        rank = max(self.rank, contents.rank if contents else 0)
        sizes = {name: layer.factors for name, layer in self._linear.items()}
        widths = {name: f.lora_A.shape[-1] + f.lora_B.shape[-1] for name, f in sizes.items()}
        for name, update in contents.updates.items() if contents else ():
            if update.lora_A is not None and update.lora_B is not None:
                widths[name] = update.lora_A.shape[-1] + update.lora_B.shape[-1]
        own = next(p for p in self.encoder.parameters() if p.is_floating_point())
        return (slots + 1) * rank * sum(widths.values()) * own.element_size()

    def reserve(self, slots: int) -> None:
        """Make room for so many adapters."""
        self.slots = max(self.slots, slots + 1)
        for layer in self._linear.values():
            layer.reserve(self.slots, self.rank)

    def put(self, slot: int, kind: str, contents: Contents) -> None:
        """Put an adapter that `check` accepts into a slot that no running batch has."""
        self.rank = max(self.rank, contents.rank)
        for name in contents.updates.keys() - self._linear.keys():
            module = self.encoder.get_submodule(name.removeprefix(f"{self.prefix}."))
            dimension = self._dimensions[name] or 0
            self._linear[name] = stacked_linear(module, self.slots, self.rank, sequences=dimension)
        for name in contents.modules:
            inside = belongs_to(name, [self.prefix])
            key = name if inside else f"{kind}:{name}"
            if key not in self._replaced:
                owner = self.encoder if inside else self.heads[kind]
                module = owner.get_submodule(name.removeprefix(f"{self.prefix}.") if inside else name)
                self._replaced[key] = replaced_module(module, sequences=self._dimensions[name] or 0)
        for name, layer in self._linear.items():
            layer.reserve(self.slots, self.rank)
            layer.put(slot, contents.updates.get(name))
        for key, place in self._replaced.items():
            of_kind, _, name = key.rpartition(":")
            own = contents.modules.get(name) if of_kind in ("", kind) else None
            plain = None if own is None else contents.plain.get(name, own)
            ReplacedModule.put(place, slot, own, plain)
        self._kinds[slot] = kind

    def remove(self, slot: int) -> None:
        """Empty a slot that no running batch has."""
        for layer in self._linear.values():
            layer.put(slot, None)
        for place in self._replaced.values():
            ReplacedModule.put(place, slot, None, None)
        self._kinds.pop(slot, None)

    def pretrained(self, inputs: Mapping[str, Tensor], slot: int) -> None:
        """Run the encoder as the head of a slot does, but without any adapter: for whoever watches its modules."""
        nothing = Batch.of([NONE] * len(next(iter(inputs.values()))), self.device, enabled=False)
        with self._running(nothing), _pass():
            self.heads[self._kinds[slot]](**inputs)

    def alike(self, slots: Iterable[int]) -> bool:
        """Whether the heads of some slots give the same to the encoder."""
        return len({self._first[self._kinds[slot]] for slot in slots}) == 1

    def read_below(self, slots: Iterable[int]) -> set[int]:
        """The layers below the last one, from 1, whose states the heads of some slots read."""
        heads = {self._kinds[slot] for slot in slots}
        return {layer for kind in heads for layer in getattr(self.heads[kind], "layers", ())[:-1]}

    def __call__(
        self, inputs: Mapping[str, Tensor], slots: Sequence[int], *, enabled: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        """The logits of groups of rows, each `(rows, labels of the widest head)`; rows without a head are left out.

        inputs: what the classifier takes, each `(rows, ...)`. slots: of the rows, those of one kind and in it those of
        one slot side by side. enabled: False for the pretrained encoder under the adapters' heads.
        """
        batch = Batch.of(slots, self.device, enabled=enabled)
        kinds: dict[str, list[slice]] = {}
        for slot, rows in batch.groups():
            if slot in self._kinds:
                kinds.setdefault(self._kinds[slot], []).append(rows)
        places = {kind: slice(parts[0].start, parts[-1].stop) for kind, parts in kinds.items()}
        if not places:
            raise ValueError("no row has an adapter; expected one at least")
        # The first one's head gets all rows, and the others what the encoder gave to it, if they call it alike.
        lead, *others = places
        with self._running(batch), _pass(hidden_states=len(others) > 0) as kept:
            logits, outputs = self.heads[lead](**inputs).logits, kept.outputs
        yield places[lead], logits[places[lead]]
        for kind in others:
            rows = places[kind]
            part = Batch.of(slots[rows], self.device, enabled=enabled)
            alike = self._first[kind] == self._first[lead]
            with self._running(part), _pass(_rows_of(outputs, rows, len(batch)) if alike else None):
                own = {name: value[rows] for name, value in inputs.items()}
                yield rows, self.heads[kind](**own).logits

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[None]:
        """`running` in the types of the model, whatever the caller's autocast says: stacks and layers agree."""
        with running(batch), torch.autocast(self.device.type, enabled=False):
            yield


class _Pass(threading.local):
    """What a thread's encoder pass gave, or what is given in its place."""

    outputs: Any = None
    given: bool = False
    hidden_states: bool = False


_PASS = _Pass()


@contextmanager
def _pass(outputs: Any = None, *, hidden_states: bool = False) -> Iterator[_Pass]:
    """Inside, `_SharedEncoder` gives `outputs`, or else runs and keeps its outputs."""
    before = _PASS.outputs, _PASS.given, _PASS.hidden_states
    _PASS.outputs, _PASS.given, _PASS.hidden_states = outputs, outputs is not None, hidden_states
    try:
        yield _PASS
    finally:
        _PASS.outputs, _PASS.given, _PASS.hidden_states = before


class _SharedEncoder(nn.Module):
    """What stands in a head's classifier in the place of the encoder, which it shares with others."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        # In a tuple: it is no part of the head.
        self._encoder = (encoder,)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The encoder's outputs, from its one pass for a batch."""
        if _PASS.given:
            return _PASS.outputs
        if _PASS.hidden_states:
            options["output_hidden_states"] = True
        _PASS.outputs = self._encoder[0](*inputs, **options)
        return _PASS.outputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._encoder[0], name)


def _rows_of(outputs: Any, rows: slice, count: int) -> Any:
    """Some rows of an encoder's outputs."""
    if isinstance(outputs, Tensor):
        return outputs[rows] if outputs.ndim and len(outputs) == count else outputs
    if isinstance(outputs, tuple):
        return tuple(_rows_of(part, rows, count) for part in outputs)
    if isinstance(outputs, Mapping):
        values = {name: _rows_of(part, rows, count) for name, part in outputs.items()}
        return type(outputs)(**values)
    return outputs


@contextmanager
def _tensors_given(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, collects the tensors that a module is called with, by the names of its parameters."""
    given: dict[str, Tensor] = {}

    def note(_: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        bound = signature(module.forward).bind(*inputs, **options).arguments
        given.update({name: value for name, value in bound.items() if isinstance(value, Tensor)})

    with module.register_forward_pre_hook(note, with_kwargs=True):
        yield given


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@contextmanager
def _calls(model: nn.Module) -> Iterator[dict[str, set[tuple[int, ...]]]]:
    """Inside, collects the shapes of what each module is given and gives, in the order of their first calls.

    () stands for what is no tensor but holds some.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    hooks = []

    def note(name: str, *values: Any) -> None:
        found = shapes.setdefault(name, set())
        found.update(tuple(value.shape) for value in values if isinstance(value, Tensor))
        if any(isinstance(value, tuple | list | Mapping) for value in values):
            found.add(())

    for name, module in model.named_modules():
        if name:
            before = lambda _, inputs, options, name=name: note(name, *inputs, *options.values())  # noqa: E731
            after = lambda _, inputs, output, name=name: note(name, output)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after))
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def _dimension(shapes: Collection[tuple[int, ...]], count: int) -> int | None:
    """The dimension that counts the sequences, or each several times; None where one does not in every call."""
    found = {
        0 if shape and shape[0] % count == 0 else 1 if len(shape) > 2 and shape[1] == count else None
        for shape in shapes
    }
    return found.pop() if len(found) == 1 else None
