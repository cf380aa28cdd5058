from __future__ import annotations

import torch
from torch import nn

from hf_lora.recipe.compare import Snapshot


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made[0].weight.requires_grad_(False)
    return made


def test_a_snapshot_keeps_the_trained_parameters_and_gives_them_back() -> None:
    made = model()
    snapshot = Snapshot.of(made)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert snapshot.values.keys() == {"0.bias", "1.weight", "1.bias"}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    snapshot.restore(made)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name] + (name == "0.weight")), name


def test_a_snapshot_tells_whether_the_trained_parameters_are_the_same() -> None:
    made = model()
    snapshot = Snapshot.of(made)
    assert snapshot.is_of(made)
    with torch.no_grad():
        made[0].weight.add_(1.0)  # frozen
    assert snapshot.is_of(made)
    with torch.no_grad():
        made[1].bias[1] = torch.nextafter(made[1].bias[1], torch.tensor(9.0))
    assert not snapshot.is_of(made)
    snapshot.restore(made)
    assert snapshot.is_of(made)
    made[0].weight.requires_grad_(True)
    assert not snapshot.is_of(made)
