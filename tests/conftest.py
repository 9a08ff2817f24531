"""What all unit tests share. The rules for the notebooks under nbval are in
notebooks/conftest.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # a test that reached for the hub would depend on the day
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if (
    not torch.cuda.is_available()
):  # read when Triton is imported, where it is installed: its kernels are tested without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
