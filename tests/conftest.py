"""What all tests share."""

import os

import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs its kernels; read when Triton is imported, by whichever test it is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
