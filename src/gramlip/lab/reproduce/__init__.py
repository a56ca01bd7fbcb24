"""The experiments of arXiv 2305.16173, and further ones on its claims: `gramlip reproduce EXPERIMENT`."""

from __future__ import annotations

from gramlip.lab.reproduce.layers import CERTIFICATES, CONV, DENSE, RESNET18, SCALING
from gramlip.lab.reproduce.run import TRAINING, Experiment, Options, Row, Task, reproduce

EXPERIMENTS = {experiment.name: experiment for experiment in (DENSE, CONV, RESNET18, SCALING, CERTIFICATES, TRAINING)}
"""Name -> experiment."""

__all__ = [
    "CERTIFICATES",
    "CONV",
    "DENSE",
    "EXPERIMENTS",
    "RESNET18",
    "SCALING",
    "TRAINING",
    "Experiment",
    "Options",
    "Row",
    "Task",
    "reproduce",
]
