import logging
import os
import random

# Before anything that reads it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

# More threads than this slow small models down and starve the second rank of distributed tests.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# The first call of a torch kernel is slow, so no deadline; the same examples in every run.
settings.register_profile("lightning-prune", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("lightning-prune")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same generators, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def quiet_lightning() -> None:
    """No device tables and tips: set before every test, as importing lightning resets it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
