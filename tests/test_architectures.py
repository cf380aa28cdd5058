import pytest
import torch
from conftest import tiny_classifier

from hf_lora.architectures import ARCHITECTURES, ROLES
from hf_lora.config import LoRAConfig
from hf_lora.targets import find_targets

STEP_ONE = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "mpnet",
    "albert",
    "deberta-v2",
]


def test_the_promised_model_types_are_there():
    assert set(STEP_ONE) <= set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", STEP_ONE)
def test_each_role_is_found_once_in_each_block(model_type):
    model = tiny_classifier(model_type)
    blocks = 1 if model_type == "albert" else 2
    for role in ROLES:
        targets = find_targets(model, LoRAConfig(projections=role))
        assert len(targets) == blocks, (role, targets)
        assert all(isinstance(model.get_submodule(target.name), torch.nn.Linear) for target in targets)


@pytest.mark.parametrize("model_type", STEP_ONE)
def test_roles_play_their_part_in_attention(model_type):
    """By gradients: scores move with q and k, the value only scales with v, and o follows attention."""
    model = tiny_classifier(model_type)
    names = {role: find_targets(model, LoRAConfig(projections=role))[0].name for role in ROLES}
    assert len(set(names.values())) == 4
    order = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, role=role: order.append(role))
        for role, name in names.items()
    ]
    model(input_ids=torch.arange(5, 15).reshape(1, 10))
    for hook in hooks:
        hook.remove()
    assert set(order[:3]) == set("qkv") and order[3] == "o"
