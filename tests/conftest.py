"""Every test starts from one seed and leaves torch's global settings as it found them, and so does the library under it."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of CIFAR-10's parquet files."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("cifar")
    source = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("test", 32)):
        images = []
        for pixels in torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=source):
            buffer = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(buffer, "png")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": images, "label": torch.randint(10, (count,), generator=source).tolist()})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """The hub's own client, offline, with a cache in its real layout; called with kind and repository it gives the snapshot's folder."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra gramlip[hub]")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def snapshot(kind: str, repository: str) -> Path:
        home, commit = tmp_path / "hub" / f"{kind}s--{repository.replace('/', '--')}", "0" * 40
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        (home / "snapshots" / commit).mkdir(parents=True)
        return home / "snapshots" / commit

    return snapshot
