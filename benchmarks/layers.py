"""Forward and backward of a RUM on the CPU beside its own matrix products, torch.nn.LSTM and GRU.

python benchmarks/layers.py [threads]     two minutes on two cores; results/layers_cpu.json

All peers run in one process, in turns; the table shows medians and ratios. `error` is the largest
relative difference of outputs and gradients to the reference in float64.
"""

import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells import RUMCell
from rum.kernels.cpu import library

RESULTS = Path(__file__).parents[1] / "results" / "layers_cpu.json"
INPUT_SIZE = 32
ROUNDS = 7
SIZES = ((256, 128, 150), (1024, 128, 50), (100, 32, 150), (50, 128, 50), (250, 1, 150))
MEMORY_SIZES = ((50, 128, 50), (100, 32, 100))

Run = Callable[[], None]
Product = Callable[[Tensor, Tensor], Tensor]


def products(size: int, input: Tensor, product: Product) -> Run:
    """The matrix products alone, in the order of a RUM's forward and backward pass."""
    steps, batch, features = input.shape
    weight, from_input = torch.randn(2 * size, size), torch.randn(3 * size, features)
    hidden, grad = torch.randn(batch, size), torch.randn(steps, batch, 2 * size)
    states, grad_input = torch.randn(steps * batch, size), torch.randn(steps * batch, 3 * size)
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


def error(cell: RUMCell, input: Tensor) -> float:
    """Against the reference in float64 with the same weights."""
    exact = copy.deepcopy(cell).double()
    exact.backend = "reference"
    results = []
    for each, dtype in ((cell, torch.float32), (exact, torch.float64)):
        output = each.unroll(input.to(dtype))[0]
        gradients = torch.autograd.grad(output.sum(), tuple(each.parameters()))
        results.append([tensor.double() for tensor in (output, *gradients)])
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(*results, strict=True)
    )


def measure(peers: dict[str, Run]) -> dict[str, float]:
    """Medians in milliseconds; peers take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(ROUNDS + 1):
        for name, run in peers.items():
            began = time.perf_counter()
            run()
            if turn:  # the first is to warm up
                seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def without_memory(size: int, batch: int, steps: int) -> dict[str, float]:
    """Lambda = 0."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, INPUT_SIZE)
    backends = ["reference", "fused", *(["cpu"] if library() else [])]
    cells = {name: RUMCell(INPUT_SIZE, size, backend=name) for name in backends}
    fastest = cells[backends[-1]]
    normed = RUMCell(INPUT_SIZE, size, layer_norm=True, eta=1.0, zoneout=0.1)
    peers = {
        "products, torch.mm": products(size, input, F.linear),
        "products, oneDNN": products(size, input, by_onednn),
        **{name: training(cell, input) for name, cell in cells.items()},
        "layer norm, eta, zoneout": training(normed, input),
        "nn.LSTM": training(nn.LSTM(INPUT_SIZE, size), input),
        "nn.GRU": training(nn.GRU(INPUT_SIZE, size), input),
    }
    result = measure(peers)
    result["error"] = error(fastest, input)
    return result


def with_memory(size: int, batch: int, steps: int) -> dict[str, float]:
    """Lambda = 1."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, INPUT_SIZE)
    backends = ["reference", "fused", *(["cpu"] if library() else [])]
    cells = {name: RUMCell(INPUT_SIZE, size, lambda_=1, backend=name) for name in backends}
    result = measure({name: training(cell, input) for name, cell in cells.items()})
    result["error"] = error(cells[backends[-1]], input)
    return result


def peak_gigabytes(backend: str) -> dict[str, float]:
    """What a training pass over copying with T = 1000 adds to the peak memory of a process."""
    script = f"""
import re, time, torch
from rum.cells import RUMCell
torch.set_num_threads({torch.get_num_threads()})
cell = RUMCell(10, 100, lambda_=1, backend={backend!r})
input = torch.randn(1020, 128, 10)
def peak():  # of this program alone: getrusage also remembers the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
cell.unroll(input[:3])[0].sum().backward()
before, began = peak(), time.perf_counter()
cell.unroll(input)[0].sum().backward()
print((peak() - before) / 1e6, 1000 * (time.perf_counter() - began))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    gigabytes, milliseconds = map(float, done.stdout.split())
    return {"gigabytes": gigabytes, backend: milliseconds}


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measures, prints and keeps the table."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(threads)
    table: dict[str, dict[str, float]] = {}
    for size, batch, steps in SIZES:
        row = table[f"N {size}, B {batch}, T {steps}"] = without_memory(size, batch, steps)
        fastest = row.get("cpu", row["fused"])
        own = min(row["products, torch.mm"], row["products, oneDNN"])
        print(
            f"N {size:>4} B {batch:>3} T {steps:>3}: {fastest:8.1f} ms; ratio to its own products "
            f"{fastest / own:.2f}, nn.LSTM {fastest / row['nn.LSTM']:.2f}, "
            f"nn.GRU {fastest / row['nn.GRU']:.2f}, fused {fastest / row['fused']:.2f}, "
            f"reference {fastest / row['reference']:.2f}; with layer norm "
            f"{row['layer norm, eta, zoneout'] / fastest:.2f}; error {row['error']:.0e}"
        )
    for size, batch, steps in MEMORY_SIZES:
        row = table[f"lambda 1, N {size}, B {batch}, T {steps}"] = with_memory(size, batch, steps)
        fastest = row.get("cpu", row["fused"])
        print(
            f"lambda 1, N {size:>3} B {batch:>3} T {steps:>3}: {fastest:8.1f} ms; ratio to fused "
            f"{fastest / row['fused']:.2f}, reference {fastest / row['reference']:.2f}; "
            f"error {row['error']:.0e}"
        )
    for backend in ("fused", *(["cpu"] if library() else [])):
        row = table[f"lambda 1, N 100, B 128, T 1020, {backend}"] = peak_gigabytes(backend)
        print(
            f"lambda 1, N 100 B 128 T 1020, {backend}: {row[backend]:.0f} ms, "
            f"{row['gigabytes']:.2f} GB more at the peak"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    about = {"threads": threads, "torch": torch.__version__, "machine": processor()}
    RESULTS.write_text(json.dumps({"about": about, "milliseconds": table}, indent=1))


if __name__ == "__main__":
    main()
