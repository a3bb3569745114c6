"""The model around the recurrent layers: embedding, dropout, read-out."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells import ModelConfig, State
from rum.layers import RecurrentLayer


class SequenceModel(nn.Module):
    """Symbols in, logits out: embedding (or one-hot), recurrent layers, linear read-out.

    Dropout acts on the embedded input, between layers and before the read-out (spec of FS-RNN:
    Mujika et al. 2017; with the cells' own, these are its four positions).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        num_classes: int,
        embedding_size: int | None,
        orthogonal: bool,
    ) -> None:
        """Builds the model.

        Args:
            config: The recurrent layers.
            vocab_size: Number of input symbols.
            num_classes: Number of output classes.
            embedding_size: Features of the learned embedding; None feeds one-hot vectors.
            orthogonal: Initialise embedding and read-out as the released Penn Treebank code does
                (semi-orthogonal, bias uniform in +-0.01); otherwise as its synthetic tasks do
                (uniform in +-sqrt(6 / (vocab_size + num_classes)), bias 0.01).
        """
        super().__init__()
        self.vocab_size = vocab_size
        self.dropout = config.dropout
        self.embedding = None
        if embedding_size is not None:
            self.embedding = nn.Embedding(vocab_size, embedding_size)
        input_size = vocab_size if embedding_size is None else embedding_size
        cells = []
        for _ in range(config.num_layers):
            cells.append(config.build(input_size))
            input_size = cells[-1].hidden_size
        self.recurrent = RecurrentLayer(cells, dropout=config.dropout)
        self.readout = nn.Linear(input_size, num_classes)
        self._reset_readout(orthogonal)

    def _reset_readout(self, orthogonal: bool) -> None:
        if orthogonal:
            nn.init.orthogonal_(self.readout.weight)
            nn.init.uniform_(self.readout.bias, -0.01, 0.01)
            if self.embedding is not None:
                nn.init.orthogonal_(self.embedding.weight)
            return
        # The released code takes input and class counts here, not the layer's fan-in.
        bound = math.sqrt(6 / (self.vocab_size + self.readout.out_features))
        nn.init.uniform_(self.readout.weight, -bound, bound)
        nn.init.constant_(self.readout.bias, 0.01)

    def forward(self, symbols: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Computes logits for every step.

        Args:
            symbols: `(T, B)`, integers in [0, vocab_size).
            state: Of the recurrent layers, from an earlier call.

        Returns:
            Logits `(T, B, num_classes)` and the new state.
        """
        if self.embedding is not None:
            input = self.embedding(symbols)
        else:
            input = F.one_hot(symbols, self.vocab_size).to(self.readout.weight.dtype)
        output, state = self.recurrent(F.dropout(input, self.dropout, self.training), state)
        logits: Tensor = self.readout(F.dropout(output, self.dropout, self.training))
        return logits, state


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def build_on_meta(config: ModelConfig, **sizes: object) -> SequenceModel:
    """Builds a model without memory or initial values, to count its parameters at once."""
    with torch.device("meta"):
        return SequenceModel(config, **sizes)  # type: ignore[arg-type]  # as SequenceModel's own
