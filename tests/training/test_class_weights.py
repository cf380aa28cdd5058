import pytest
import torch
from datasets import Dataset

from hf_lora.tasks import MULTI, SINGLE, task_of
from hf_lora.training.arguments import balanced_weights


def test_balanced_weights_are_inverse_frequencies():
    data = Dataset.from_dict({"labels": [0, 0, 0, 1]})
    torch.testing.assert_close(balanced_weights(data, 2, task_of(SINGLE)), torch.tensor([4 / 6, 4 / 2]))
    several = Dataset.from_dict({"labels": [[1.0, 0.0], [1.0, 1.0]]})
    torch.testing.assert_close(balanced_weights(several, 2, task_of(MULTI)), torch.tensor([2 / 4, 2 / 2]))
    with pytest.raises(ValueError, match="got none of label 2"):
        balanced_weights(data, 3, task_of(SINGLE))
