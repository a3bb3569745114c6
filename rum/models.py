"""The model around the recurrent layers: embedding, dropout, read-out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells import ModelConfig, StackConfig, State, StoryLayout, WholeConfig
from rum.checks import check_choice
from rum.errors import ConfigError
from rum.layers import RecurrentLayer

INITIALIZATIONS = ("orthogonal", "uniform", "normal")


class SequenceModel(nn.Module):
    """Symbols in, logits out: embedding (or one-hot), recurrent layers, linear read-out.

    Dropout acts on the embedded input, between layers and before the read-out (spec of FS-RNN:
    Mujika et al. 2017; with the cells' own, these are its four positions).
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        vocab_size: int,
        num_classes: int,
        embedding_size: int | None,
        initialization: str,
        answers_last: bool = False,
    ) -> None:
        """Builds the model.

        Args:
            config: The recurrent layers.
            vocab_size: Number of input symbols.
            num_classes: Number of output classes.
            embedding_size: Features of the learned embedding; None feeds one-hot vectors.
            initialization: Of embedding and read-out, each as some released code does it:
                "orthogonal" (Penn Treebank): semi-orthogonal, bias uniform in +-0.01;
                "uniform" (copying, recall): read-out in +-sqrt(6 / (vocab_size + num_classes)),
                bias 0.01; "normal" (bAbI): embedding of mean -s and standard deviation s =
                sqrt(6 / vocab_size), read-out uniform in +-sqrt(6 / (N + embedding_size)),
                bias 0.01.
            answers_last: Read out after the last step only: logits `(1, B, num_classes)`.
        """
        super().__init__()
        check_choice("initialization", initialization, INITIALIZATIONS)
        self.vocab_size = vocab_size
        self.answers_last = answers_last
        self.dropout = config.dropout
        self.embedding = None
        if embedding_size is not None:
            self.embedding = nn.Embedding(vocab_size, embedding_size)
        input_size = vocab_size if embedding_size is None else embedding_size
        cells = []
        for layer in range(config.num_layers):
            cells.append(config.build_layer(layer, input_size))
            input_size = cells[-1].hidden_size
        self.recurrent = RecurrentLayer(cells, dropout=config.dropout)
        self.readout = nn.Linear(input_size, num_classes)
        self._reset_readout(initialization)

    def _reset_readout(self, initialization: str) -> None:
        if initialization == "orthogonal":
            nn.init.orthogonal_(self.readout.weight)
            nn.init.uniform_(self.readout.bias, -0.01, 0.01)
            if self.embedding is not None:
                nn.init.orthogonal_(self.embedding.weight)
            return
        # The released code takes sizes that are not the read-out's own here.
        sizes = self.vocab_size + self.readout.out_features
        if initialization == "normal":
            if self.embedding is not None:
                spread = math.sqrt(6 / self.vocab_size)
                nn.init.normal_(self.embedding.weight, -spread, spread)
            sizes = self.readout.in_features + self.recurrent.input_size
        bound = math.sqrt(6 / sizes)
        nn.init.uniform_(self.readout.weight, -bound, bound)
        nn.init.constant_(self.readout.bias, 0.01)

    def forward(self, symbols: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Computes logits for every step, or for the last one.

        Args:
            symbols: `(T, B)`, integers in [0, vocab_size).
            state: Of the recurrent layers, from an earlier call.

        Returns:
            Logits `(T, B, num_classes)`, with `answers_last` `(1, B, num_classes)`, and the new
            state.
        """
        output, state = self.recurrent(self.encode(symbols), state)
        return self.decode(output), state

    def encode(self, symbols: Tensor) -> Tensor:
        """Inputs of the recurrent layers, `(T, B, features)`, from symbols `(T, B)`."""
        if self.embedding is not None:
            input = self.embedding(symbols)
        else:
            input = F.one_hot(symbols, self.vocab_size).to(self.readout.weight.dtype)
        return F.dropout(input, self.dropout, self.training)

    def decode(self, output: Tensor) -> Tensor:
        """Logits, as `forward` has them, from the recurrent layers' outputs `(T, B, N)`."""
        if self.answers_last:
            output = output[-1:]
        logits: Tensor = self.readout(F.dropout(output, self.dropout, self.training))
        return logits


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a task says of the model around it; see `SequenceModel` for the meaning."""

    vocab_size: int
    num_classes: int
    embedding_size: int | None
    initialization: str
    answers_last: bool = False
    story: StoryLayout | None = None
    """Of tasks that ask about stories."""


def build_model(config: ModelConfig, sizes: ModelSizes) -> nn.Module:
    """Builds the model of a configuration.

    Raises:
        ConfigError: If the model cannot serve the task.
    """
    if isinstance(config, WholeConfig):
        if sizes.story is None:
            raise ConfigError(
                f"model {config.name} answers questions about stories: task must be babi"
            )
        return config.build_model(
            vocab_size=sizes.vocab_size, num_classes=sizes.num_classes, story=sizes.story
        )
    assert isinstance(config, StackConfig)
    return SequenceModel(
        config,
        vocab_size=sizes.vocab_size,
        num_classes=sizes.num_classes,
        embedding_size=sizes.embedding_size,
        initialization=sizes.initialization,
        answers_last=sizes.answers_last,
    )


def build_on_meta(config: ModelConfig, sizes: ModelSizes) -> nn.Module:
    """Builds a model without memory or initial values, to count its parameters at once."""
    with torch.device("meta"):
        return build_model(config, sizes)
