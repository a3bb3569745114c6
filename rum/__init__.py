"""Rotational Unit of Memory for PyTorch: layers, cells, tasks, training and search."""

from rum import functional
from rum.layers import (
    EUNN,
    GORU,
    GRU,
    HMLSTM,
    LSTM,
    NAS,
    NTM,
    RUM,
    FastSlowRNN,
    FastWeights,
    HighwayRUM,
    HyperLSTM,
    WeiNet,
)
from rum.replicas import Replicas

__version__ = "0.1.0"

__all__ = [
    "EUNN",
    "GORU",
    "GRU",
    "HMLSTM",
    "LSTM",
    "NAS",
    "NTM",
    "RUM",
    "FastSlowRNN",
    "FastWeights",
    "HighwayRUM",
    "HyperLSTM",
    "Replicas",
    "WeiNet",
    "__version__",
    "functional",
]
