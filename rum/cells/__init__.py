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
from rum.cells.eunn import EUNNCell, EUNNConfig
from rum.cells.fast_slow import FastSlowCell, FastSlowConfig, FSLSTMConfig, FSRUMConfig
from rum.cells.fast_weights import FastWeightsCell, FastWeightsCellConfig, FastWeightsConfig
from rum.cells.goru import GORUCell, GORUCellConfig, GORUConfig
from rum.cells.gru import GRUCell, GRUCellConfig, GRUConfig
from rum.cells.highway_rum import HighwayRUMCell, HighwayRUMCellConfig, HighwayRUMConfig
from rum.cells.lstm import LSTMCell, LSTMCellConfig, LSTMConfig
from rum.cells.rum import RUMCell, RUMCellConfig, RUMConfig
from rum.cells.weinet import WeiNetCell, WeiNetCellConfig, WeiNetConfig

__all__ = [
    "MODELS",
    "Cell",
    "CellConfig",
    "EUNNCell",
    "EUNNConfig",
    "FSLSTMConfig",
    "FSRUMConfig",
    "FastSlowCell",
    "FastSlowConfig",
    "FastWeightsCell",
    "FastWeightsCellConfig",
    "FastWeightsConfig",
    "GORUCell",
    "GORUCellConfig",
    "GORUConfig",
    "GRUCell",
    "GRUCellConfig",
    "GRUConfig",
    "HighwayRUMCell",
    "HighwayRUMCellConfig",
    "HighwayRUMConfig",
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
    "WeiNetCell",
    "WeiNetCellConfig",
    "WeiNetConfig",
    "WholeConfig",
    "register_model",
]
