"""The experiments of arXiv 2305.16173, and those that its claims call for: `gramlip reproduce EXPERIMENT`."""

from __future__ import annotations

from gramlip.reproduce.certificates import CERTIFICATES
from gramlip.reproduce.conv import CONV
from gramlip.reproduce.dense import DENSE
from gramlip.reproduce.resnet18 import RESNET18
from gramlip.reproduce.run import Experiment, Options, Row, Task, reproduce
from gramlip.reproduce.scaling import SCALING
from gramlip.reproduce.training import TRAINING

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
