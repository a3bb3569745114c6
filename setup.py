"""Builds the compiled kernels where there is a C compiler; all else is in pyproject.toml."""

import platform
import sys

from setuptools import Extension, setup

# Loaded with ctypes, so it is no Python module. OpenMP's library is torch's own at run time: both
# ask for libgomp.so.1. Without a compiler the installation goes on (`optional`).
KERNEL = Extension(
    "rum.kernels._rum_cpu",
    ["rum/kernels/rum_cpu.c", "rum/kernels/rum_cpu_gates.c"],
    depends=["rum/kernels/rum_cpu_product.h", "rum/kernels/rum_cpu_rows.h"],
    extra_compile_args=[
        "-O3",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    ],
    extra_link_args=["-fopenmp", "-lm"],
    optional=True,
)

setup(ext_modules=[KERNEL] if sys.platform == "linux" else [])
