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
from rum.cells.hm_lstm import HMLSTMCell, HMLSTMCellConfig, HMLSTMConfig
from rum.cells.hyper_lstm import HyperLSTMCell, HyperLSTMCellConfig, HyperLSTMConfig
from rum.cells.lstm import LSTMCell, LSTMCellConfig, LSTMConfig
from rum.cells.nas import NASCell, NASCellConfig, NASConfig
from rum.cells.ntm import NTMCell, NTMCellConfig, NTMConfig
from rum.cells.rum import RUMCell, RUMCellConfig, RUMConfig, UpperRUMConfig
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
    "HMLSTMCell",
    "HMLSTMCellConfig",
    "HMLSTMConfig",
    "HighwayRUMCell",
    "HighwayRUMCellConfig",
    "HighwayRUMConfig",
    "HyperLSTMCell",
    "HyperLSTMCellConfig",
    "HyperLSTMConfig",
    "LSTMCell",
    "LSTMCellConfig",
    "LSTMConfig",
    "ModelConfig",
    "NASCell",
    "NASCellConfig",
    "NASConfig",
    "NTMCell",
    "NTMCellConfig",
    "NTMConfig",
    "RUMCell",
    "RUMCellConfig",
    "RUMConfig",
    "StackConfig",
    "State",
    "StoryLayout",
    "UpperRUMConfig",
    "WeiNetCell",
    "WeiNetCellConfig",
    "WeiNetConfig",
    "WholeConfig",
    "register_model",
]
