"""gramlip beside packages that it does not need: `make test-integrations`. Nothing here asks the network for anything."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "ACCELERATE_USE_CPU": "true"}

import vision  # noqa: F401  before transformers, which imports torchvision where it is installed
