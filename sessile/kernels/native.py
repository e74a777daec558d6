"""Kernels in C++ for the CPU: which builds there are, which of them this processor runs, and how they are called.

The sources lie in `cpp`; `make compile` builds them once for each set of instructions into build/native, beside a stamp
of the sources. A build that does not fit the sources is never used. Nothing is missing without one but speed: the
kernels of numba serve. The threads are those of torch's own OpenMP runtime, as for those (see `compiled`).
"""

import ctypes
import hashlib
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SOURCES = Path(__file__).parent / "cpp"
FOLDER = Path(__file__).parents[2] / "build" / "native"
STAMP = "stamp.txt"
OPTIONS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti",
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """A set of instructions. options: of the compiler. needs: of the processor's flags, as Linux names them."""

    name: str
    options: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = (
    Level(
        "avx512_bf16", ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"), _AVX512 | {"avx512_bf16", "avx512_vnni"},
    ),
    Level("avx512", ("-march=x86-64-v4",), _AVX512),
    Level("avx2", ("-march=x86-64-v3",), _AVX2),
    Level("plain", (), frozenset()),
)
"""Fastest first; the last runs on any processor of this architecture."""


@dataclass(frozen=True)
class NativeBuild:
    """Whether the kernels are usable here, what was found, and what to do to have them."""

    usable: bool
    found: str
    remedy: str = ""


FLOAT32_INPUTS, BFLOAT16_INPUTS, INT8_INPUTS = range(3)
"""What linear layers multiply weights with, as cpp/decoder.cpp numbers it."""

POOL_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""What K and V are kept in, as cpp/decoder.cpp numbers it."""

PHASES = ("prepare", "qkv", "rotate", "chunks", "queries", "output", "gate and up", "down")
"""What a step's time is told of, as cpp/decoder.cpp numbers it; "prepare" is norms and rounding of inputs."""

LAYER_PHASES_MAX = 12
"""Times that threads wait for each other in a layer, at most, as in cpp/decoder.cpp."""


class _OpenMp(ctypes.Structure):
    _fields_ = [("thread_number", ctypes.c_int64), ("thread_count", ctypes.c_int64)]


class Linear(ctypes.Structure):
    """One packed linear layer, by addresses."""

    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "blocks", "rows", "k", "bias")]


class Layer(ctypes.Structure):
    """One layer of a decoder, by addresses; 0 where the model has no such part."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_int64) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
    ]


class Step(ctypes.Structure):
    """Arguments of `sessile_step`; cpp/decoder.cpp says what each is."""

    _fields_ = [
        ("openmp", _OpenMp),
        *((name, ctypes.c_int64) for name in (
            "layers", "tokens", "hidden", "heads", "kv_heads", "d", "inner", "inputs",
            "pool", "row_pages", "page_size",
        )),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_int64) for name in (
            "layer_table", "residual", "cosine", "sine", "slots", "table", "queries", "query_table", "items",
            "item_table", "chunks", "chunk_table", "key_tiles", "query_tiles", "is_read", "nanoseconds", "counts",
            "scratch", "scratch_bytes",
        )),
    ]  # fmt: skip


class Product(ctypes.Structure):
    """Arguments of `sessile_product`: x float32[tokens, k] times a linear layer → out float32[tokens, rows]."""

    _fields_ = [
        ("openmp", _OpenMp),
        ("linear", Linear),
        *((name, ctypes.c_int64) for name in (
            "tokens", "inputs", "x", "out", "counts", "scratch", "scratch_bytes",
        )),
    ]  # fmt: skip


class NativeKernels:
    """One loaded build. Threads that call it have scratch memory of their own; not for use from inside itself."""

    def __init__(self, level: str) -> None:
        self.level = level
        self._library = ctypes.CDLL(str(FOLDER / _file_name(level)))
        for name in ("sessile_multiplies", "sessile_step_bytes", "sessile_product_bytes"):
            getattr(self._library, name).restype = ctypes.c_int64
        openmp = _openmp()
        self._run = openmp.GOMP_parallel
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._run.restype = None
        self._openmp = _OpenMp(_address(openmp.omp_get_thread_num), _address(openmp.omp_get_num_threads))
        self._step, self._product = _address(self._library.sessile_step), _address(self._library.sessile_product)
        self._own = threading.local()
        self.multiplies_bfloat16, self.multiplies_int8 = (
            bool(self._library.sessile_multiplies(ctypes.c_int64(inputs))) for inputs in (BFLOAT16_INPUTS, INT8_INPUTS)
        )

    def step(self, step: Step) -> None:
        """Run all layers; the arrays that the addresses name must live until this returns."""
        self._call(step, self._library.sessile_step_bytes, self._step, LAYER_PHASES_MAX * step.layers)

    def product(self, product: Product) -> None:
        """Run one linear layer; the arrays that the addresses name must live until this returns."""
        self._call(product, self._library.sessile_product_bytes, self._product, 2)

    def _call(self, arguments: Any, count_bytes: Any, function: int, phases: int) -> None:
        threads = torch.get_num_threads()
        needed = count_bytes(ctypes.byref(arguments), ctypes.c_int64(threads)) + 64
        scratch: npt.NDArray[np.uint8] = getattr(self._own, "scratch", np.empty(0, np.uint8))
        if scratch.size < needed:
            scratch = self._own.scratch = np.empty(needed, np.uint8)
        # Vectors of 64 bytes that lie across two lines of the cache take twice as long.
        start = -scratch.ctypes.data % 64
        counts = np.zeros((phases, 2), np.int64)
        arguments.openmp = self._openmp
        arguments.counts = counts.ctypes.data
        arguments.scratch = scratch.ctypes.data + start
        arguments.scratch_bytes = scratch.size - start
        self._run(function, ctypes.addressof(arguments), threads, 0)


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for pages of 2 MiB where a tensor on the CPU lies: its rows are read at random, and each page is a lookup.

    Advice only; where the system has no such pages nothing changes. To be given before the memory is first written.
    """
    page, huge = 4096, 1 << 21
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // page * page
    if platform.system() == "Linux" and length >= huge:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, length, 14)  # MADV_HUGEPAGE


def runnable_levels(flags: frozenset[str] | None = None) -> Sequence[Level]:
    """Of LEVELS, those that a processor with these flags (None: this one) runs, fastest first."""
    if flags is None:
        flags = processor_flags()
    return [level for level in LEVELS if level.needs <= flags]


@cache
def processor_flags() -> frozenset[str]:
    """Instruction sets of this processor, as Linux names them; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def native_stamp() -> str:
    """What a build depends on: sources, options and architecture."""
    levels = [(level.name, level.options) for level in LEVELS]
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()} {OPTIONS} {levels}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def available_native() -> NativeBuild:
    """What `native_kernels` would load; changes nothing."""
    remedy = "Run `make compile` (needs g++): steps take a third of the time."
    if not (FOLDER / STAMP).is_file():
        return NativeBuild(False, "not built; numba's kernels serve", remedy)
    if (FOLDER / STAMP).read_text().strip() != native_stamp():
        return NativeBuild(False, "built of other sources; numba's kernels serve", "Run `make compile` again.")
    try:
        _openmp()
    except (OSError, AttributeError) as error:
        return NativeBuild(False, f"torch's OpenMP runtime is not usable ({error})", "Install torch from its wheels.")
    level = _best_level()
    if level is None:
        return NativeBuild(False, "not built for this processor", "Run `make compile` on this machine.")
    return NativeBuild(True, f"built, for {level}")


@cache
def native_kernels(level: str = "auto") -> NativeKernels | None:
    """The build for a level of LEVELS, "auto" being the fastest that runs here; None if it is not usable."""
    if not available_native().usable:
        return None
    best = _best_level()
    chosen = best if level == "auto" else level
    if chosen is None or chosen not in [each.name for each in runnable_levels()]:
        return None
    return NativeKernels(chosen) if (FOLDER / _file_name(chosen)).is_file() else None


def _best_level() -> str | None:
    return next((level.name for level in runnable_levels() if (FOLDER / _file_name(level.name)).is_file()), None)


def _file_name(level: str) -> str:
    return f"decoder-{level}.so"


@cache
def _openmp() -> Any:
    """The library whose threads torch runs on. Raises OSError or AttributeError."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
        getattr(library, name)
    return library


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
