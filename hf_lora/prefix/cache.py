"""The output of the frozen prefix, kept across epochs in memory or on disk.

The states are a function of the inputs alone, so a digest of the inputs is their key: no row number has to travel
through samplers, collators and column pruning, and equal examples are kept once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_lora.models.verify import relative_difference
from hf_lora.prefix.encoder import FrozenPrefix
from hf_lora.prefix.store import StateStore

logger = logging.getLogger(__name__)

_FULL = "cache_frozen_prefix: the examples change between epochs; those without room are run every time"


@dataclass(frozen=True)
class PaddedBatch:
    """A collated batch without labels, and where in its `length` columns each example lies: (start, stop)."""

    inputs: dict[str, Any]
    spans: tuple[tuple[int, int], ...]
    length: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> PaddedBatch:
        """From input_ids `(batch, length)`, a mask of that shape where there is padding, and whatever else."""
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        ids, mask = rest.get("input_ids"), rest.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            got = ", ".join(rest)
            raise ValueError(
                f"cache_frozen_prefix needs input_ids (batch, length) in a batch; got {got}; run without it"
            )
        rows, length = ids.shape
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return cls(rest, ((0, length),) * rows, length)
        seen = mask.cpu().ne(0).int()
        # Of a row that is padding only argmax says 0 twice, and all of it counts as the example.
        starts, ends = seen.argmax(1).tolist(), seen.flip(1).argmax(1).tolist()
        return cls(rest, tuple((a, length - b) for a, b in zip(starts, ends, strict=True)), length)

    @property
    def padding(self) -> tuple[str, ...]:
        """The sides on which some example is padded."""
        left, right = any(start for start, _ in self.spans), any(stop < self.length for _, stop in self.spans)
        return ("left",) * left + ("right",) * right

    def part(self, rows: Sequence[int]) -> PaddedBatch:
        """The examples of these rows, without the columns that none of them uses."""
        start, stop = min(self.spans[row][0] for row in rows), max(self.spans[row][1] for row in rows)
        inputs = {name: self._cut(value, list(rows), start, stop) for name, value in self.inputs.items()}
        spans = tuple((self.spans[row][0] - start, self.spans[row][1] - start) for row in rows)
        return PaddedBatch(inputs, spans, stop - start)

    def keys(self) -> list[bytes]:
        """A digest of each example's inputs, the same wherever and with whatever padding it comes."""
        values = sorted(self.inputs.items())
        on_cpu = [(name, value.cpu() if isinstance(value, Tensor) else value) for name, value in values]
        keys = []
        for row, (start, stop) in enumerate(self.spans):
            digest = hashlib.blake2b(digest_size=16)
            for name, value in on_cpu:
                value = self._cut(value, slice(row, row + 1), start, stop)
                content = _content(value) if isinstance(value, Tensor) else repr(value).encode()
                digest.update(f"{name}:{len(content)}:".encode() + content)
            keys.append(digest.digest())
        return keys

    def _cut(self, value: Any, rows: list[int] | slice, start: int, stop: int) -> Any:
        """What a value has of these rows and columns; a value that is of no example stays as it is."""
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(self.spans):
            return value
        per_token = value.dim() > 1 and value.shape[1] == self.length
        return value[rows][:, start:stop] if per_token else value[rows]


class PrefixCache:
    """The frozen prefix of a model, run once for an example and then read.

    tokens: how many the examples have together; more are run again every time.
    mode, limit, directory: as for `StateStore`, which is made once the first batch shows width and type.
    """

    def __init__(self, model: Any, tokens: int, *, mode: str, limit: float, directory: str | Path) -> None:
        self.prefix = FrozenPrefix(model)
        self._make_store = partial(StateStore, tokens, mode=mode, limit=limit, directory=directory)
        self.store: StateStore | None = None
        self._checked: set[tuple[str, ...]] = set()
        self._full = False

    @contextmanager
    def replaying(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Inside, a forward of the model on `inputs` begins at the first trained block.

        Raises ValueError if the first batch of a kind of padding gives anything else in the ordinary way.
        """
        batch = PaddedBatch.of(inputs)
        if batch.padding not in self._checked:
            self._check(batch)
        with self.prefix.replay(self.states(batch)):
            yield

    def states(self, batch: PaddedBatch) -> Tensor:
        """The states `(batch, length, width)`, zero where there is padding; what is not kept is run and kept."""
        assert self.store is not None
        keys = batch.keys()
        known = [self.store.get(key) for key in keys]
        missing = [row for row, states in enumerate(known) if states is None]
        if missing:
            part = batch.part(missing)
            recorded = self.prefix.record(part.inputs)
            for row, states, (start, stop) in zip(missing, recorded.cpu(), part.spans, strict=True):
                known[row] = states[start:stop]
                if self.store.get(keys[row]) is None and not self.store.put(keys[row], states[start:stop]):
                    if not self._full:
                        logger.warning(_FULL)
                    self._full = True
        found = [states for states in known if states is not None]
        padded = found[0].new_zeros(len(keys), batch.length, found[0].shape[-1])
        for row, (states, (start, stop)) in enumerate(zip(found, batch.spans, strict=True)):
            padded[row, start:stop] = states
        return padded

    def close(self) -> None:
        """Give memory and disk space back."""
        if self.store is not None:
            self.store.close()

    def _check(self, batch: PaddedBatch) -> None:
        """Compare with ordinary forwards of the batch, the first of its kind of padding."""
        states, logits = self.prefix.observe(batch.inputs)
        if self.store is None:
            self.store = self._make_store(states.shape[-1], states.dtype)
        # Alone, the shortest example has no padding: what depends on the padding shows.
        row = min(range(len(batch.spans)), key=lambda row: batch.spans[row][1] - batch.spans[row][0])
        start, stop = batch.spans[row]
        try:
            alone = self.prefix.record(batch.part([row]).inputs)[0]
            with self.prefix.replay(self.states(batch)):
                _, replayed = self.prefix.observe(batch.inputs)
        # What a model's code may raise where blocks that it needs did nothing.
        except (AttributeError, TypeError, LookupError, RuntimeError) as error:
            raise ValueError(
                f"the model does not run without its frozen blocks; got {type(error).__name__}: {error}; "
                "run without cache_frozen_prefix"
            ) from error
        differences = {
            "frozen blocks that see the padding": relative_difference(alone, states[row, start:stop]),
            "other logits from the kept states": relative_difference(replayed, logits),
        }
        for what, difference in differences.items():
            if not difference <= self.prefix.tolerance:
                raise ValueError(
                    f"cache_frozen_prefix would not be exact; got {what}, with padding on the "
                    f"{' and '.join(batch.padding) or 'no side'}: a difference of {difference:.2g}, expected at most "
                    f"{self.prefix.tolerance:.2g}; pad on the right if it is on the left, else run without it"
                )
        self._checked.add(batch.padding)


# What wraps the model's own forward, or is random before the blocks: (what, whether a trainer has it, instead).
_REFUSED: tuple[tuple[str, Callable[[Trainer], bool], str], ...] = (
    ("FSDP", lambda trainer: trainer.is_fsdp_enabled, "run on several GPUs with DDP"),
    ("DeepSpeed", lambda trainer: trainer.is_deepspeed_enabled, "run on several GPUs with DDP"),
    ("several GPUs in one process", lambda trainer: trainer.args.n_gpu > 1, "use accelerate launch"),
    ("torch_compile", lambda trainer: trainer.args.torch_compile, "leave one of the two out"),
    ("neftune_noise_alpha", lambda trainer: bool(trainer.neftune_noise_alpha), "leave one of the two out"),
)


def open_prefix_cache(trainer: Trainer, tokens: int | None) -> PrefixCache | None:
    """The cache that the arguments ask for, if any. tokens: of the training set; None: unknown.

    Raises ValueError where model, data or trainer do not allow it.
    """
    mode = getattr(trainer.args, "cache_frozen_prefix", "no")
    if mode == "no":
        return None
    for what, present, instead in _REFUSED:
        if present(trainer):
            raise ValueError(f"cache_frozen_prefix does not work with {what}; got {mode!r}; {instead}")
    if tokens is None:
        raise ValueError(
            "cache_frozen_prefix needs a training set with a length and rows with input_ids; "
            f"got {type(trainer.train_dataset).__name__}; run without it"
        )
    limit, directory = trainer.args.frozen_prefix_cache_gb * (1 << 30), trainer.args.output_dir
    return PrefixCache(trainer.model, tokens, mode=mode, limit=limit, directory=directory)


def _content(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
