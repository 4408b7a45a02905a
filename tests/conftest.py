"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, whose own functions read it


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def opsin_data() -> Path:
    """The folder of real data that OPSIN_DATA names; the test is skipped where there is none."""
    folder = os.environ.get("OPSIN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs the data folder that the variable OPSIN_DATA names")
    return Path(folder)
