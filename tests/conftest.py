"""Every test starts from one seed and leaves torch's global settings as it found them, and so does the library under it."""

from __future__ import annotations

import pytest
import torch


def settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _one_seed_and_no_trace():
    before = settings()
    torch.manual_seed(0)
    yield
    assert settings() == before
