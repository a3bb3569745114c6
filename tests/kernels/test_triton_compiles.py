"""What Triton's compiler makes of the kernels for an H100, without one.

In a process of its own, for kernels that were defined for the interpreter cannot be compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:  # not imported: see test_triton.py
    pytest.skip("needs the package triton", allow_module_level=True)

SHARED_MEMORY = 99 * 1024  # of the smallest device from compute capability 8.0 on, per program
PLAIN = {"gate_gain": None, "gate_shift": None, "gain": None, "shift": None, "GATE_NORM": None}
NORM = {"GATE_NORM": "post_sigmoid"}
STEP = {"ACTIVATION": "relu", "HAS_ETA": True}
IEEE, TF32 = {"PRECISION": "ieee", "ROWS": 4}, {"PRECISION": "tf32", "ROWS": 8}
HALF = {"PRECISION": "ieee", "ROWS": 8}
SPILLED = 64  # bytes of registers of a thread
# memory and gradient fill most of the registers; Triton 3.6 puts twice as much aside as 3.9
SPILLED_WITH_LARGE_MEMORY = 1200
# kernel, dtype of the weight, constants, warps
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {}
for direction in ("forward", "backward"):
    is_back = direction == "backward"
    for block, warps in ((256, 1), (2048, 8)):
        CASES[f"rows {direction} {block}"] = (
            f"rows_{direction}",
            "fp32",
            {**STEP, **NORM, "BLOCK_N": block},
            warps,
        )
    for name, dtype, constants in (
        ("ieee", "fp32", IEEE),
        ("tf32", "fp32", TF32),
        ("half", "bf16", HALF),
    ):
        CASES[f"sequence {direction} {name} 256"] = (
            f"sequence_{direction}",
            dtype,
            {**STEP, **PLAIN, **constants, "BLOCK_N": 256, "CHUNK": 32},
            8,
        )
    for dtype, block, warps in (("fp32", 64, 8), ("fp32", 128, 8), ("bf16", 128, 8)):
        CASES[f"memory {direction} {dtype} {block}"] = (
            f"memory_{direction}",
            dtype,
            {**STEP, **PLAIN, "BLOCK_N": block, **({"CHUNK": 32} if is_back else {})},
            warps,
        )
    CASES[f"lstm {direction} 1024"] = (f"_lstm_{direction}", "fp32", {"BLOCK_N": 1024}, 4)
    CASES[f"gru {direction} 1024"] = (f"_gru_{direction}", "fp32", {"BLOCK_N": 1024}, 4)

COMPILE = """
import json, os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rum.kernels import triton_gates, triton_kernels

WHOLE = ("step", "steps", "batch", "size")
REAL = ("forget_bias", "zoneout_h", "zoneout_c")

def resources(name, weight, constants, warps):
    kernel = getattr(triton_kernels, name, None) or getattr(triton_gates, name)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in WHOLE:
            signature[argument] = "i32"
        elif argument in REAL:
            signature[argument] = "fp32"
        else:
            signature[argument] = "*" + (weight if argument in ("weight", "operand") else "fp32")
    position = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    aligned = {
        position[argument]: [["tt.divisibility", 16]]
        for argument, kind in signature.items()
        if kind.startswith("*")
    }
    source = ASTSource(
        kernel, signature, {position[key]: value for key, value in constants.items()}, aligned
    )
    options = {**triton_kernels.launched_on(warps), "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [os.path.join(tools, "cuobjdump"), "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout
    numbers = dict(part.split(":")[:2] for part in usage.split() if ":" in part and part[0] != "/")
    return {
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]),
        "shared": compiled.metadata.shared,
    }

cases = json.load(sys.stdin)
print(json.dumps({key: resources(*case) for key, case in cases.items()}))
"""


def test_kernels_compile_and_fit() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(CASES),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(json.dumps(found, indent=1))  # noqa: T201, the numbers are worth reading: pytest -s
    for key, used in found.items():
        is_large = "memory" in key and "128" in key
        assert used["shared"] <= SHARED_MEMORY, (key, used)
        assert used["spilled"] <= (SPILLED_WITH_LARGE_MEMORY if is_large else SPILLED), (key, used)
