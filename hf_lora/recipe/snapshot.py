"""The trained parameters of a model at one moment: to go back to, and to know whether they have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """The trained parameters of a model at one moment, on the CPU."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The parameters as they are now."""
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return cls({name: p.detach().to("cpu", copy=True) for name, p in trained})

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Give the model these parameters again."""
        parameters = dict(model.named_parameters())
        for name, value in self.values.items():
            parameters[name].copy_(value)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model has these parameters and no others, bit for bit."""
        now = Snapshot.of(model).values
        return now.keys() == self.values.keys() and all(
            torch.equal(now[name], value) for name, value in self.values.items()
        )
