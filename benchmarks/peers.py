"""What the timings of layers compare: bare products, other layers, a RUM written plainly."""

import copy
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells import RUMCell

Run = Callable[[], None]
Product = Callable[[Tensor, Tensor], Tensor]


class EagerRUM(nn.Module):
    """A RUM with lambda = 0 as one writes it from the paper's equations, step by step."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_size, hidden_size)
        self.gates = nn.Linear(input_size + hidden_size, 2 * hidden_size)
        self.hidden_size = hidden_size

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """`(T, B, input_size)` to `(T, B, N)`, and the last state."""
        hidden = input.new_zeros(input.shape[1], self.hidden_size)
        outputs = []
        for x in input:
            target, update = self.gates(torch.cat((x, hidden), -1)).chunk(2, -1)
            update, embedded = torch.sigmoid(update), self.embed(x)
            candidate = torch.relu(embedded + self.rotate(embedded, target, hidden))
            hidden = update * hidden + (1 - update) * candidate
            outputs.append(hidden)
        return torch.stack(outputs), hidden

    @staticmethod
    def rotate(source: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        """The vector, turned in the plane of source and target by the angle between them."""
        u, r = F.normalize(source, dim=-1), F.normalize(target, dim=-1)
        cos = (u * r).sum(-1, keepdim=True)
        v = F.normalize(target - (u * target).sum(-1, keepdim=True) * u, dim=-1)
        sin = torch.sqrt((1 - cos * cos).clamp(min=0) + 1e-8)
        on_u = (u * vector).sum(-1, keepdim=True)
        on_v = (v * vector).sum(-1, keepdim=True)
        turned = (cos * on_u - sin * on_v) * u + (sin * on_u + cos * on_v) * v
        return vector - on_u * u - on_v * v + turned


def products(size: int, input: Tensor, product: Product) -> Run:
    """The matrix products alone, in the order of a RUM's forward and backward pass."""
    steps, batch, features = input.shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=input.dtype, device=input.device)

    weight, from_input = random(2 * size, size), random(3 * size, features)
    hidden, grad = random(batch, size), random(steps, batch, 2 * size)
    states, grad_input = random(steps * batch, size), random(steps * batch, 3 * size)
    flat, transposed = input.reshape(-1, features), weight.t().contiguous()

    def run() -> None:
        product(flat, from_input)
        for _ in range(steps):
            product(hidden, weight)
        for t in range(steps):
            product(grad[t], transposed)
        product(states.t(), grad.view(-1, 2 * size).t())
        product(flat.t(), grad_input.t())

    return run


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b' by the library behind nn.LSTM on the CPU."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


def training(module: nn.Module, input: Tensor) -> Run:
    """Forward and backward of a layer or of a cell over a sequence."""
    call = module.unroll if isinstance(module, RUMCell) else module

    def run() -> None:
        module.zero_grad()
        call(input)[0].sum().backward()

    return run


def equal_size(size: int, features: int, gates: int) -> int:
    """Hidden size at which `torch.nn.LSTM` (4 gates) or GRU (3) has the parameters of a RUM."""
    parameters = 2 * size * size + 3 * size * features + 3 * size
    return round((math.sqrt((features + 2) ** 2 + 4 * parameters / gates) - features - 2) / 2)


def measure(peers: dict[str, Run], rounds: int) -> dict[str, float]:
    """Medians in milliseconds; peers take turns."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 2):
        for name, run in peers.items():
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn > 1:  # the first two are to warm up
                seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def error(cell: RUMCell, input: Tensor) -> float:
    """Largest relative difference of outputs and gradients to the reference in float64."""
    exact = copy.deepcopy(cell).double()
    exact.backend = "reference"
    results = []
    for each, dtype in ((cell, input.dtype), (exact, torch.float64)):
        output = each.unroll(input.to(dtype))[0]
        gradients = torch.autograd.grad(output.sum(), tuple(each.parameters()))
        results.append([tensor.double() for tensor in (output, *gradients)])
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(*results, strict=True)
    )


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
