"""Forward and backward of RUM layers on a CUDA device beside their products, cuDNN and loops.

python benchmarks/layers_gpu.py     results/layers_gpu.json

All peers run in one process, in turns; medians and ratios. Matrix products take bfloat16 operands,
in our layers by autocast with weights, states and norms in float32; the other layers are in
bfloat16 as a whole. "equal" layers have as many parameters as the RUM, "eager" is a RUM written
step by step in plain PyTorch, "graphed" the same in a CUDA graph. `error` is the largest relative
difference of outputs and gradients to the reference in float64.
"""

import copy
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import EagerRUM, Run, equal_size, error, measure, products, training
from torch import Tensor, nn

import rum
from rum.cells import LSTMCellConfig, RUMCell, RUMCellConfig

RESULTS = Path(__file__).parents[1] / "results" / "layers_gpu.json"
INPUT_SIZE = 128
ROUNDS = 20
HALF = torch.bfloat16

Row = dict[str, float | str]


def autocast(run: Run) -> Run:
    """The same with products in bfloat16."""

    def mixed() -> None:
        with torch.autocast("cuda", dtype=HALF):
            run()

    return mixed


def graphed(run: Run) -> Run:
    """Captures a run in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def flash_rnn(function: str, gates: int, size: int, batch: int, steps: int) -> Run:
    """FlashRNN's whole-sequence kernel, which is compiled at its first use."""
    from flashrnn import flashrnn

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=HALF, requires_grad=True)

    inputs = random(batch, steps, gates, 1, size)
    weights = random(gates, 1, size, size), random(gates, 1, size)

    def run() -> None:
        outputs = flashrnn(inputs, *weights, function=function, backend="cuda_fused")[0]
        outputs.sum().backward()

    run()
    return run


def with_optional(
    peers: dict[str, Run], optional: dict[str, Callable[[], Run]]
) -> tuple[dict[str, Run], Row]:
    """Adds peers that may not work here; says why not."""
    failed: Row = {}
    for name, make in optional.items():
        try:
            peers[name] = make()
        except Exception as problem:  # noqa: BLE001  # a peer that fails is a result
            failed[name] = f"did not build: {type(problem).__name__}: {str(problem)[:200]}"
    return peers, failed


def without_memory(size: int, batch: int, steps: int) -> Row:
    """Lambda = 0 beside everything."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, INPUT_SIZE, device="cuda")
    half = input.to(HALF)

    def cell(backend: str) -> RUMCell:
        return RUMCell(INPUT_SIZE, size, backend=backend, device="cuda")

    def other(kind: type[nn.LSTM] | type[nn.GRU], hidden: int) -> Run:
        return training(kind(INPUT_SIZE, hidden, device="cuda", dtype=HALF), half)

    eager = EagerRUM(INPUT_SIZE, size).to("cuda", HALF)
    triton = cell("triton")
    peers, failed = with_optional(
        {
            "triton": autocast(training(triton, input)),
            "triton, float32": training(triton, input),
            "fused": autocast(training(cell("fused"), input)),
            "eager": training(eager, half),
            "nn.LSTM": other(nn.LSTM, size),
            "nn.GRU": other(nn.GRU, size),
            "equal nn.LSTM": other(nn.LSTM, equal_size(size, INPUT_SIZE, 4)),
            "equal nn.GRU": other(nn.GRU, equal_size(size, INPUT_SIZE, 3)),
        },
        {
            "products": lambda: graphed(products(size, half, F.linear)),
            "graphed": lambda: graphed(training(copy.deepcopy(eager), half)),
            "FlashRNN LSTM": lambda: flash_rnn("lstm", 4, size, batch, steps),
            "FlashRNN GRU": lambda: flash_rnn("gru", 3, size, batch, steps),
        },
    )
    result: Row = {**measure(peers, ROUNDS), **failed}
    torch.backends.cuda.matmul.allow_tf32 = False
    result["error, float32"] = error(triton, input[: min(steps, 20)])
    with torch.autocast("cuda", dtype=HALF):
        result["error"] = error(triton, input[: min(steps, 20)])
    return result


def with_memory(size: int, batch: int, steps: int) -> Row:
    """Lambda = 1, with the memory that a training pass needs at its peak."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, 10, device="cuda")
    cells = {
        name: RUMCell(10, size, lambda_=1, backend=name, device="cuda")
        for name in ("triton", "fused")
    }
    result: Row = dict(measure({name: training(c, input) for name, c in cells.items()}, 5))
    for name, cell in cells.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training(cell, input)()
        result[f"gigabytes, {name}"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    result["error, float32"] = error(cells["triton"], input[:20])
    return result


def fast_slow() -> Row:
    """FS-RUM-2 at the size of the paper's Penn Treebank model (Table 5)."""
    torch.manual_seed(0)
    input = torch.randn(150, 128, 128, device="cuda")
    fast = LSTMCellConfig(hidden_size=700, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5)
    slow = RUMCellConfig(hidden_size=1000, layer_norm=True, zoneout=0.1, eta=1.0)
    layers = {
        name: rum.FastSlowRNN(128, fast=fast, slow=slow, dropout=0.35, backend=name, device="cuda")
        for name in ("triton", "fused", "reference")
    }
    return dict(measure({n: autocast(training(m, input)) for n, m in layers.items()}, 5))


def replicas(size: int, batch: int, steps: int, count: int) -> Row:
    """K layers in one process: side by side as one, and one alone."""
    torch.manual_seed(0)
    layers = [rum.RUM(10, size, eta=1.0, device="cuda") for _ in range(count)]
    together = rum.Replicas(layers)
    input = torch.randn(count, steps, batch, 10, device="cuda")
    peers = {"one": training(layers[0], input[0]), "together": training(together, input)}
    return dict(measure(peers, ROUNDS))


def main() -> None:
    """Measures, prints and keeps the table."""
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device: nothing was measured")
    import triton

    table = {
        f"{name}": make(*sizes)
        for name, make, *sizes in (
            ("N 2000, B 128, T 150", without_memory, 2000, 128, 150),
            ("N 250, B 128, T 1020", without_memory, 250, 128, 1020),
            ("N 256, B 32, T 100", without_memory, 256, 32, 100),
            ("lambda 1, N 100, B 128, T 1020", with_memory, 100, 128, 1020),
            ("lambda 1, N 50, B 128, T 50", with_memory, 50, 128, 50),
            ("FS-RUM-2 700/1000/700, B 128, T 150", fast_slow),
            ("16 replicas, N 100, B 32, T 150", replicas, 100, 32, 150, 16),
        )
    }
    for name, row in table.items():
        print(name)
        for peer, value in row.items():
            print(f"    {peer}: {value if isinstance(value, str) else format(value, '.4g')}")
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuDNN": torch.backends.cudnn.version(),
        "machine": torch.cuda.get_device_name(),
    }
    RESULTS.write_text(json.dumps({"about": about, "milliseconds": table}, indent=1))


if __name__ == "__main__":
    main()
