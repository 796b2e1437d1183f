"""Random tensors are the same in every run."""

from types import SimpleNamespace

import hypothesis
import pytest
import torch

# Hypothesis seeds what it knows of before every example.
_TORCH_RANDOM = SimpleNamespace(
    seed=torch.manual_seed, getstate=torch.get_rng_state, setstate=torch.set_rng_state
)
hypothesis.register_random(_TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
