"""ONNX: a file's graph as a module of torch, so that a model is audited as any other."""

from __future__ import annotations

from gramlip.onnx import layers, tensors
from gramlip.onnx.model import OnnxModule, load
from gramlip.onnx.registry import OPERATORS

__all__ = ["OPERATORS", "OnnxModule", "layers", "load", "tensors"]
