"""`Monitor` with the loggers and training loops that people have: each with the real library, and what it wrote read back."""

from __future__ import annotations

import math
import pickle
import struct
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

import gramlip as gl


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), from all event files below a folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return found


def test_tensorboard(tmp_path: Path) -> None:
    monitor = gl.nn.Monitor(net(), (3, 8, 8), certify_every=2)
    with SummaryWriter(tmp_path) as writer:
        written = [monitor.log(writer, step=step) for step in (0, 7)]
    read = scalars(tmp_path)
    assert set(read) == {f"{name}/{path}" for name in ("sigma", "stable_rank", "lower", "upper") for path in "03"}
    assert [step for step, _ in read["sigma/0"]] == [0, 7]
    assert [step for step, _ in read["upper/0"]] == [7]
    assert read["sigma/3"][1][1] == pytest.approx(written[1]["sigma/3"], rel=1e-6)


def history(folder: Path) -> list[dict[str, str]]:
    """The rows that an offline run of W&B wrote: its file is a log of LevelDB, blocks of 32 KiB, a header of 7 bytes before each part."""
    (file,) = folder.rglob("run-*.wandb")
    data, at, parts, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header begins there
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # a whole record, or the last part of one
            record, parts = wandb_internal_pb2.Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
    return rows


def test_wandb(tmp_path: Path) -> None:
    monitor = gl.nn.Monitor(net())
    with wandb.init(mode="offline", dir=tmp_path, project="norms") as run:
        written = [monitor.log(run, step=step) for step in (0, 5)]
    wandb.teardown()  # its process writes the file, and has written all of it when it ends
    rows = history(tmp_path)
    assert [int(row["_step"]) for row in rows] == [0, 5]
    assert {name: float(rows[1][name]) for name in written[1]} == pytest.approx(written[1])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning(tmp_path: Path) -> None:
    module, callback = Module(), gl.nn.LightningMonitor((3, 8, 8), every=4)
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1000}
    trainer = pl.Trainer(max_steps=10, logger=loggers, callbacks=[callback], accumulate_grad_batches=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(80, 3, 8, 8)), batch_size=4))
    read = scalars(tmp_path / "tb")
    assert [step for step, _ in read["sigma/net.0"]] == [0, 4, 8]  # once for each, whatever the batches that are gathered
    # the last reading is below the norm of two steps later by no more than two steps
    truth = gl.bound(module.net[0]).upper
    assert read["sigma/net.0"][-1][1] == pytest.approx(truth, rel=0.05)
    assert trainer.callback_metrics["stable_rank/net.3"].item() == pytest.approx(read["stable_rank/net.3"][-1][1], rel=1e-6)
    assert "sigma/net.3" in next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert isinstance(callback, pl.Callback)


def test_hugging_face_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(30, (8,)), "labels": i % 2} for i in range(48)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        logging_steps=4,
        report_to=["tensorboard"],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.add_callback(gl.nn.TrainerMonitor(trainer, every=4, where=lambda path, _: "attention" in path))
    trainer.train()
    layer = "bert.encoder.layer.1.attention.self.query"
    rows = [row for row in trainer.state.log_history if f"sigma/{layer}" in row]
    assert [row["step"] for row in rows] == [1, 5, 9]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [4, 8, 12]  # what the trainer logs itself is all there
    assert all(math.isfinite(row[f"stable_rank/{layer}"]) for row in rows)
    truth = gl.bound(model.get_submodule(layer)).upper
    assert rows[-1][f"sigma/{layer}"] == pytest.approx(truth, rel=0.02)
    tags = scalars(tmp_path)
    assert [step for step, _ in tags[f"train/sigma/{layer}"]] == [1, 5, 9]
    assert isinstance(trainer.pop_callback(gl.nn.TrainerMonitor), transformers.TrainerCallback)


def test_the_classes_are_found_by_their_names() -> None:
    for name in ("LightningMonitor", "TrainerMonitor"):
        assert pickle.loads(pickle.dumps(getattr(gl.nn, name))) is getattr(gl.nn, name)


def test_a_loop_and_a_writer_of_another_kind() -> None:
    monitor = gl.nn.Monitor(net())
    assert set(monitor.log(step=0)) == {"sigma/0", "sigma/3", "stable_rank/0", "stable_rank/3"}
    with pytest.raises(gl.InputError, match="of type list was given"):
        monitor.log([], step=1)
