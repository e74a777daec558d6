"""Triton's kernels run in its interpreter where there is no GPU; without Triton their tests are not collected."""

import importlib.util
import os

import torch

GPU_TESTS = "test_triton_*.py"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

collect_ignore_glob = [] if importlib.util.find_spec("triton") else [GPU_TESTS]
