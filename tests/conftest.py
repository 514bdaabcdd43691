"""One thread per worker (tiny tensors, reductions in one order), one seed for every test."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--plus-seed", type=int, default=0, help="option sets of test_plus.py")
