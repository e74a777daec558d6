"""Without Triton the tests of its kernels are not collected; without a GPU they run in its interpreter."""

import importlib.util

GPU_TESTS = "test_triton_*.py"

collect_ignore_glob = [] if importlib.util.find_spec("triton") else [GPU_TESTS]
