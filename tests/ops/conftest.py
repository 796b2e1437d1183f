"""Random tensors are the same in every run."""

import hypothesis
import pytest
import torch


class TorchRandom:
    """What Hypothesis needs, to seed torch before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
