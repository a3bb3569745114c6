"""Rotational Unit of Memory for PyTorch: layers, cells, tasks, training and search."""

from rum import functional
from rum.layers import LSTM, RUM, FastSlowRNN

__version__ = "0.1.0"

__all__ = ["LSTM", "RUM", "FastSlowRNN", "__version__", "functional"]
