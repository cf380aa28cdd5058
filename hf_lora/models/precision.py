"""In which precision the frozen network runs: chosen from what the hardware is good at, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PRECISIONS = ("auto", "fp32", "bf16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """`name` is "fp32" or "bf16"; `reason` says in a few words why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen weights; LoRA and head are fp32 in either."""
        return _DTYPES[self.name]

    def __str__(self) -> str:
        return f"precision: {self.name} ({self.reason})"


def choose_precision(
    requested: str = "auto",
    device: str | torch.device | None = None,
    *,
    autocast: bool = False,
    sharded: bool = False,
) -> Precision:
    """The precision of the frozen weights on `device` (None: the GPU where there is one).

    "auto" is bf16 where the hardware multiplies it natively, else fp32. LoRA and head need no lower
    precision: they are small, and their updates are too fine for bf16.
    autocast: whether every product is cast anyway, as `--bf16` and `--fp16` ask for.
    sharded: whether parameters are sharded over processes (FSDP, ZeRO-3), which wants one type for all.
    Raises ValueError for another word than those in `PRECISIONS`.
    """
    if requested not in PRECISIONS:
        raise ValueError(
            f"precision is not usable; got {requested!r}; expected one of {', '.join(PRECISIONS)}"
        )
    if requested != "auto":
        return Precision(requested, "as asked for")
    if autocast:
        return Precision("fp32", "cast at every step, as --bf16 or --fp16 asks for")
    if sharded:
        return Precision("fp32", "sharded parameters must be of one type")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    instruction = _NATIVE[kind]() if kind in _NATIVE else None
    if instruction is None:
        return Precision("fp32", f"this {kind.upper()} does not multiply bf16 natively")
    return Precision("bf16", f"this {kind.upper()} multiplies bf16 natively: {instruction}")


def _cpu_instruction() -> str | None:
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)


def _cuda_instruction() -> str | None:
    return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else None


_NATIVE: dict[str, Callable[[], str | None]] = {"cpu": _cpu_instruction, "cuda": _cuda_instruction}
