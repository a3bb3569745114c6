"""Optimisers by name, TensorFlow 1's RMSProp among them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rum.training.config import TrainingConfig


class TensorFlowRMSProp(torch.optim.Optimizer):
    """RMSProp with TensorFlow 1's defaults.

    ```
    ms <- decay ms + (1 - decay) g^2          ms starts at ONE
    w  <- w - learning_rate g / sqrt(ms + eps)    eps INSIDE the root
    ```

    torch.optim.RMSprop starts at zero with eps outside: its first step is learning_rate /
    sqrt(1 - decay) per coordinate whatever the gradient, here about learning_rate * g.

    Source: TensorFlow r1 `training_ops.cc`, ApplyRMSProp; defaults of `tf.train.RMSPropOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        decay: float = 0.9,
        eps: float = 1e-10,
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean_square"] = torch.ones_like(parameter)
                gradient: Tensor = parameter.grad
                mean_square = state["mean_square"]
                mean_square.lerp_(gradient.square(), 1 - group["decay"])
                root = (mean_square + group["eps"]).sqrt_()
                parameter.addcdiv_(gradient, root, value=-group["lr"])


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Builds the optimiser that `config` names."""
    parameters = list(model.parameters())
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.learning_rate, alpha=0.9)
    if config.optimizer == "rmsprop_tensorflow":
        return TensorFlowRMSProp(parameters, lr=config.learning_rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    return torch.optim.Adam(parameters, lr=config.learning_rate)
