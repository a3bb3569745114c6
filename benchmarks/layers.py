"""Forward and backward of a RUM on the CPU beside its own matrix products and other layers.

python benchmarks/layers.py [threads]     five minutes on two cores; results/layers_cpu.json

All peers run in one process, in turns; the table shows medians and ratios. "equal" layers have as
many parameters as the RUM, "eager" is a RUM written step by step in plain PyTorch, "compiled" the
same by torch.compile (its compilation is timed apart). `error` is the largest relative difference
of outputs and gradients to the reference in float64.
"""

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch._inductor.utils
import torch.nn.functional as F
from peers import (
    EagerRUM,
    by_onednn,
    equal_size,
    error,
    measure,
    processor,
    products,
    training,
)
from torch import nn

import rum
from rum.cells import LSTMCellConfig, RUMCell, RUMCellConfig
from rum.kernels.cpu import library

RESULTS = Path(__file__).parents[1] / "results" / "layers_cpu.json"
INPUT_SIZE = 32
ROUNDS = 7
SIZES = ((256, 128, 150), (1024, 128, 50), (100, 32, 150), (50, 128, 50), (250, 1, 150))
COMPILED = (50, 128, 50)  # torch.compile unrolls time: minutes for the longer ones
MEMORY_SIZES = ((50, 128, 50), (100, 32, 100))
CHAIN_SIZES = (
    ("layer-norm LSTM", 250, 64, 100),
    ("FS-RUM-2", 100, 64, 100),
    ("FS-RUM-2", 350, 64, 50),
)
REPLICA_SIZES = ((20, 8, 50), (50, 32, 50), (100, 32, 150))
BACKENDS = ["reference", "fused", *(["cpu"] if library() else [])]


def without_memory(size: int, batch: int, steps: int) -> dict[str, float]:
    """Lambda = 0."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, INPUT_SIZE)
    cells = {name: RUMCell(INPUT_SIZE, size, backend=name) for name in BACKENDS}
    normed = RUMCell(INPUT_SIZE, size, layer_norm=True, eta=1.0, zoneout=0.1)
    eager = EagerRUM(INPUT_SIZE, size)
    equal_lstm, equal_gru = (equal_size(size, INPUT_SIZE, gates) for gates in (4, 3))
    peers = {
        "products, torch.mm": products(size, input, F.linear),
        "products, oneDNN": products(size, input, by_onednn),
        **{name: training(cell, input) for name, cell in cells.items()},
        "layer norm, eta, zoneout": training(normed, input),
        "eager": training(eager, input),
        "nn.LSTM": training(nn.LSTM(INPUT_SIZE, size), input),
        "nn.GRU": training(nn.GRU(INPUT_SIZE, size), input),
        "equal nn.LSTM": training(nn.LSTM(INPUT_SIZE, equal_lstm), input),
        "equal nn.GRU": training(nn.GRU(INPUT_SIZE, equal_gru), input),
    }
    result = {}
    if (size, batch, steps) == COMPILED:
        peers["compiled"] = training(torch.compile(eager), input)
        began = time.perf_counter()
        with torch._inductor.utils.fresh_cache():  # else an earlier run's
            peers["compiled"]()
        result["seconds to compile"] = time.perf_counter() - began
    result |= measure(peers, ROUNDS)
    result["error"] = error(cells[BACKENDS[-1]], input)
    return result


def with_memory(size: int, batch: int, steps: int) -> dict[str, float]:
    """Lambda = 1."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, INPUT_SIZE)
    cells = {name: RUMCell(INPUT_SIZE, size, lambda_=1, backend=name) for name in BACKENDS}
    result = measure({name: training(cell, input) for name, cell in cells.items()}, ROUNDS)
    result["error"] = error(cells[BACKENDS[-1]], input)
    return result


def replicas(count: int, size: int, batch: int, steps: int) -> dict[str, float]:
    """Layers side by side, and the same in turn."""
    torch.manual_seed(0)
    layers = [rum.RUM(INPUT_SIZE, size) for _ in range(count)]
    input = torch.randn(count, steps, batch, INPUT_SIZE)
    each = [training(layer, input[lane]) for lane, layer in enumerate(layers)]
    peers = {
        "one": each[0],
        "in turn": lambda: [run() for run in each],
        "side by side": training(rum.Replicas(layers), input),
    }
    return measure(peers, ROUNDS)


def chains(kind: str, size: int, batch: int, steps: int) -> dict[str, float]:
    """A layer-normalised LSTM of N = `size`, or an FS-RUM-2 with such LSTMs and a RUM of 3/2 N."""
    torch.manual_seed(0)
    input = torch.randn(steps, batch, INPUT_SIZE)
    lstm = LSTMCellConfig(hidden_size=size, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5)
    slow = RUMCellConfig(hidden_size=3 * size // 2, layer_norm=True, eta=1.0, zoneout=0.1)
    layers: dict[str, nn.Module] = {}
    for name in BACKENDS:
        if kind == "FS-RUM-2":
            layers[name] = rum.FastSlowRNN(
                INPUT_SIZE, fast=lstm, slow=slow, dropout=0.35, backend=name
            )
        else:
            options = {"layer_norm": True, "zoneout_h": 0.1, "zoneout_c": 0.5}
            layers[name] = rum.LSTM(INPUT_SIZE, size, backend=name, **options)
    if kind != "FS-RUM-2":
        layers["nn.LSTM"] = nn.LSTM(INPUT_SIZE, size)
    return measure({name: training(layer, input) for name, layer in layers.items()}, ROUNDS)


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


def main() -> None:
    """Measures, prints and keeps the table."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(threads)
    table: dict[str, dict[str, float]] = {}
    for size, batch, steps in SIZES:
        row = table[f"N {size}, B {batch}, T {steps}"] = without_memory(size, batch, steps)
        fastest = row.get("cpu", row["fused"])
        own = min(row["products, torch.mm"], row["products, oneDNN"])
        to = {name: fastest / milliseconds for name, milliseconds in row.items()}
        print(
            f"N {size:>4} B {batch:>3} T {steps:>3}: {fastest:8.1f} ms; ratio to its own products "
            f"{fastest / own:.2f}, nn.LSTM {to['nn.LSTM']:.2f} (equal parameters "
            f"{to['equal nn.LSTM']:.2f}), nn.GRU {to['nn.GRU']:.2f} ({to['equal nn.GRU']:.2f}), "
            f"eager {to['eager']:.2f}, fused {to['fused']:.2f}, reference {to['reference']:.2f}; "
            f"with layer norm {row['layer norm, eta, zoneout'] / fastest:.2f}; "
            f"error {row['error']:.0e}"
        )
        if "compiled" in row:
            print(
                f"    ratio to the compiled loop {to['compiled']:.2f}, which took "
                f"{row['seconds to compile']:.0f} s to compile"
            )
    for size, batch, steps in MEMORY_SIZES:
        row = table[f"lambda 1, N {size}, B {batch}, T {steps}"] = with_memory(size, batch, steps)
        fastest = row.get("cpu", row["fused"])
        print(
            f"lambda 1, N {size:>3} B {batch:>3} T {steps:>3}: {fastest:8.1f} ms; ratio to fused "
            f"{fastest / row['fused']:.2f}, reference {fastest / row['reference']:.2f}; "
            f"error {row['error']:.0e}"
        )
    for kind, size, batch, steps in CHAIN_SIZES:
        row = table[f"{kind}, N {size}, B {batch}, T {steps}"] = chains(kind, size, batch, steps)
        fastest = row.get("cpu", row["fused"])
        others = {name: f"{fastest / row[name]:.2f}" for name in row if row[name] != fastest}
        print(f"{kind}, N {size:>3} B {batch:>3} T {steps:>3}: {fastest:8.1f} ms; ratios {others}")
    for size, batch, steps in REPLICA_SIZES:
        name = f"16 replicas, N {size}, B {batch}, T {steps}"
        row = table[name] = replicas(16, size, batch, steps)
        print(
            f"{name}: {row['side by side']:.1f} ms; ratio to one "
            f"{row['side by side'] / row['one']:.1f}, to 16 in turn "
            f"{row['side by side'] / row['in turn']:.2f}"
        )
    for backend in BACKENDS[1:]:
        row = table[f"lambda 1, N 100, B 128, T 1020, {backend}"] = peak_gigabytes(backend)
        print(
            f"lambda 1, N 100 B 128 T 1020, {backend}: {row[backend]:.0f} ms, "
            f"{row['gigabytes']:.2f} GB more at the peak"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "threads": threads,
        "torch": torch.__version__,
        "machine": processor(),
    }
    RESULTS.write_text(json.dumps({"about": about, "milliseconds": table}, indent=1))


if __name__ == "__main__":
    main()
