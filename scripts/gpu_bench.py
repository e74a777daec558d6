"""Print the tables of docs/BENCHMARKS.md for a GPU: gpu_bench.py [--shapes 8B 1.5B] [--groups steps throughput …]"""

import argparse

import torch

from sessile.engine.compiled import use_compiled_core

core = use_compiled_core()  # Before anything imports the core, as the engine's process does.

from sessile.bench.gpu_kernels import CASES, measure_backends
from sessile.bench.gpu_speed import BATCHES, GROUPS, machine_line, measure_shape
from sessile.core.limits import SchedulerOptions
from sessile.engine.config import EngineOptions

ALL_GROUPS = ("kernels", *GROUPS)


def main() -> None:
    """Measure what the command line asks for, one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=("8B", "1.5B"), default=["1.5B", "8B"])
    parser.add_argument("--groups", nargs="+", choices=ALL_GROUPS, default=list(ALL_GROUPS))
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--quantize", nargs="+", choices=("none", "int8", "int4", "fp8"), default=["none"])
    parser.add_argument("--mixed-chunk-tokens", type=int, help="as for `sessile serve`")
    parser.add_argument("--step-limit-ms", type=float, help="as for `sessile serve`")
    parser.add_argument("--trace", action="store_true", help="say what the device did, step by step")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu-bench needs a CUDA GPU; none was found.\n")
    print(f"{machine_line()}; core: {core.found}. {core.remedy}".rstrip())
    if "kernels" in asked.groups:
        for case in CASES:
            print(*measure_backends(case), sep="\n")
    groups = set(asked.groups) - {"kernels"}
    for shape in asked.shapes if groups else []:
        scheduler = SchedulerOptions(mixed_chunk_tokens=asked.mixed_chunk_tokens)
        options = EngineOptions(step_limit_ms=asked.step_limit_ms)
        for quantize in asked.quantize:
            measure_shape(
                shape, groups, tuple(asked.batches), scheduler, options, traced=asked.trace, quantize=quantize
            )  # fmt: skip


if __name__ == "__main__":
    main()
