"""Recurrent cells, their configurations and the registry of models."""

from rum.cells.base import (
    MODELS,
    Cell,
    CellConfig,
    ModelConfig,
    StackConfig,
    State,
    StoryLayout,
    WholeConfig,
    register_model,
)
from rum.cells.fast_slow import FastSlowCell, FastSlowConfig, FSLSTMConfig, FSRUMConfig
from rum.cells.lstm import LSTMCell, LSTMCellConfig, LSTMConfig
from rum.cells.rum import RUMCell, RUMCellConfig, RUMConfig

__all__ = [
    "MODELS",
    "Cell",
    "CellConfig",
    "FSLSTMConfig",
    "FSRUMConfig",
    "FastSlowCell",
    "FastSlowConfig",
    "LSTMCell",
    "LSTMCellConfig",
    "LSTMConfig",
    "ModelConfig",
    "RUMCell",
    "RUMCellConfig",
    "RUMConfig",
    "StackConfig",
    "State",
    "StoryLayout",
    "WholeConfig",
    "register_model",
]
