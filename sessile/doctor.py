"""`sessile doctor`: what this machine offers for serving, what is wrong with it, and what to do.

Examines one thing at a time and never fails itself: what cannot even be imported is a finding.
"""

import importlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sessile.config import Config
from sessile.errors import StartupError
from sessile.gguf import GgufFile
from sessile.model.config import ModelConfig, config_from_folder, config_from_gguf, resolve_model_path

PYTHON_MIN = (3, 11)
TORCH_MIN, TORCH_BELOW = (2, 11), (2, 15)
PACKAGES = (
    "numpy", "tokenizers", "safetensors", "jinja2", "msgspec", "zmq", "fastapi", "uvicorn", "uvloop", "httptools",
    "pydantic", "orjson", "prometheus_client", "httpx", "yaml", "psutil",
)  # fmt: skip
"""What serving imports, beside torch and numba, which have findings of their own."""
FAST_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
MEMORY_SPARE_BYTES = 1 << 30
"""What serving needs beside the weights at the least: Python, torch and a small KV pool."""


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "slow"
    """It serves, but not as well as it could."""
    PROBLEM = "problem"
    """It does not serve."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined: what was found, and what to do unless it is well."""

    subject: str
    level: Level
    found: str
    remedy: str = ""


def main(config: Config) -> int:
    """Examine, print a table; the exit status: 1 if something prevents serving."""
    console = Console()
    with console.status("examining this machine"):
        findings = examine(config)
    console.print(render(findings))
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if problems:
        console.print(f"{problems} of these prevent{'s' if problems == 1 else ''} serving.", style="bold red")
    else:
        console.print("Ready to serve: `sessile serve`, or `sessile chat`.", style="bold green")
    return int(problems > 0)


def examine(config: Config) -> list[Finding]:
    """Look at everything that serving with this configuration needs, in the order in which it would fail."""
    examinations: Sequence[tuple[str, Callable[[], Finding]]] = (
        ("Python", examine_python),
        ("packages", examine_packages),
        ("PyTorch", examine_torch),
        ("accelerator", examine_accelerator),
        ("numba", examine_numba),
        ("processor", examine_processor),
        ("kernels", examine_kernels),
        ("core", examine_core),
        ("model", lambda: examine_model(config)),
        ("tokenizer", lambda: examine_tokenizer(config)),
        ("memory", lambda: examine_memory(config)),
        ("port", lambda: examine_port(config)),
    )
    return [_attempt(subject, examination) for subject, examination in examinations]


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table, each remedy below what it is for."""
    colours = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        colour = colours[finding.level]
        level = f"[{colour}]{finding.level.value}[/]"
        table.add_row(finding.subject, level, escape(finding.found))
        if finding.remedy:
            table.add_row("", "", f"→ {escape(finding.remedy)}")
    return table


def examine_python() -> Finding:
    """The interpreter's version."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON_MIN:
        return Finding("Python", Level.PROBLEM, found, "Use Python 3.11 or 3.12.")
    return Finding("Python", Level.OK, found)


def examine_packages() -> Finding:
    """Whether everything that serving imports can be imported."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package may raise anything while it is imported
            missing.append(f"{name} ({type(error).__name__})")
    if missing:
        return Finding("packages", Level.PROBLEM, "cannot import " + ", ".join(missing), "Run `pip install sessile`.")
    return Finding("packages", Level.OK, f"{len(PACKAGES)} imported")


def examine_torch() -> Finding:
    """The version of torch, whether it computes, and its threads."""
    remedy = "Run `pip install torch` (versions 2.11 to 2.14)."
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # as above: a missing library of the system is an OSError, a mismatch anything
        return Finding("PyTorch", Level.PROBLEM, f"cannot import it: {_first_line(error)}", remedy)
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    found = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if float(product.sum()) != 8:
        return Finding("PyTorch", Level.PROBLEM, f"{found}; it multiplies wrongly", remedy)
    if not TORCH_MIN <= version < TORCH_BELOW:
        return Finding("PyTorch", Level.WARNING, f"{found}; not tested with this version", remedy)
    bytecode = torch.__spec__.cached if torch.__spec__ else None
    if torch.__file__ and not (bytecode and Path(bytecode).exists()):
        remedy = f"Run `python -m compileall -q {Path(torch.__file__).parent}`."
        return Finding("PyTorch", Level.WARNING, f"{found}; without bytecode: compiled anew at each start", remedy)
    return Finding("PyTorch", Level.OK, found)


def examine_accelerator() -> Finding:
    """GPUs that torch can see, and what attends with prompts on the first."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return Finding("accelerator", Level.OK, "none; the CPU serves")
    from sessile.kernels.flash_attention3 import CAPABILITY_MAJOR, available_flash_attention3

    found = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if torch.cuda.get_device_capability(0)[0] != CAPABILITY_MAJOR:
        return Finding("accelerator", Level.OK, f"{found}; attention: triton")
    flash = available_flash_attention3()
    if flash.kernels is None:
        return Finding("accelerator", Level.WARNING, f"{found}; attention: triton; {flash.found}", flash.remedy)
    return Finding("accelerator", Level.OK, f"{found}; attention: triton, prompts by {flash.found}")


def examine_numba() -> Finding:
    """Whether numba compiles for this processor: attention on the CPU is written with it."""
    remedy = "Run `pip install numba`; until then a slower torch version of attention serves."
    started_s = time.perf_counter()
    try:
        numba = importlib.import_module("numba")
        doubled = numba.njit(lambda number: number * 2)(21)
    except Exception as error:  # as above
        return Finding("numba", Level.WARNING, f"not usable: {_first_line(error)}", remedy)
    if doubled != 42:
        return Finding("numba", Level.WARNING, "it compiles wrongly", remedy)
    return Finding("numba", Level.OK, f"{numba.__version__}, compiles ({time.perf_counter() - started_s:.1f} s)")


def examine_processor() -> Finding:
    """Cores that may be used, and the instructions that make them fast."""
    from sessile.device.memory import available_cores

    name, flags = _processor()
    fast = [flag for flag in FAST_FLAGS if flag in flags]
    found = f"{available_cores()} cores, {name}" + (f" ({', '.join(fast)})" if fast else "")
    if flags and not fast:
        return Finding("processor", Level.WARNING, f"{found}: no AVX2", "Use a newer machine: this one is slow.")
    return Finding("processor", Level.OK, found)


def examine_kernels() -> Finding:
    """Whether the C++ kernels of the CPU are built and fit; numba's serve without them, slower."""
    from sessile.kernels.native import available_native

    build = available_native()
    return Finding("kernels", Level.OK if build.usable else Level.WARNING, build.found, build.remedy)


def examine_core() -> Finding:
    """Whether the scheduler runs compiled; it serves either way."""
    from sessile.engine.compiled import available_core

    build = available_core()
    return Finding("core", Level.OK, build.found, build.remedy)


def examine_model(config: Config) -> Finding:
    """Whether the configured model is there and of an architecture that we serve."""
    path, model = _configured_model(config)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files and config.model.load_format != "dummy":
        return Finding("model", Level.PROBLEM, f"{path} has no *.safetensors", "Download the model again.")
    found = f"{path.name}: {model.architecture}, {model.layers} layers, context {model.context_tokens} tokens"
    return Finding("model", Level.OK, f"{found}, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")


def examine_tokenizer(config: Config) -> Finding:
    """Whether text comes back as it went in, and whether the model can chat."""
    from sessile.text.load import load_tokenizer

    tokenizer = load_tokenizer(config.model.model)
    sample = "The café costs 3 €."
    back = tokenizer.decode(tokenizer.encode(sample))
    found = f"{len(tokenizer.vocabulary.token_bytes)} tokens"
    if back != sample:
        return Finding("tokenizer", Level.WARNING, f"{found}; {sample!r} came back as {back!r}", "Use another model.")
    if tokenizer.template is None:
        remedy = "Use an instruct model to chat; prompts to /generate and /v1/completions work."
        return Finding("tokenizer", Level.WARNING, f"{found}, no chat template", remedy)
    return Finding("tokenizer", Level.OK, f"{found}, chat template")


def examine_memory(config: Config) -> Finding:
    """Whether the weights fit what is free, limits of a container included."""
    from sessile.device.memory import available_bytes, readable

    free_bytes = available_bytes()
    found = f"{readable(free_bytes)} free"
    try:
        _, model = _configured_model(config)
    except StartupError:  # the examination of the model says why
        return Finding("memory", Level.OK, found)
    weights = importlib.import_module("sessile.model.weights")
    plain_bytes = 4.0 if config.model.dtype == "float32" else 2.0
    element_bytes = {"int8": 1.0, "fp8": 1.0, "int4": 0.7}.get(config.model.quantize, plain_bytes)
    needed_bytes = weights.weight_bytes_estimate(model, element_bytes) + MEMORY_SPARE_BYTES
    found += f", at least {readable(needed_bytes)} needed"
    if free_bytes < needed_bytes:
        remedy = "Free memory, raise the container's limit, or choose a smaller model or --quantize int8."
        return Finding("memory", Level.PROBLEM, found, remedy)
    return Finding("memory", Level.OK, found)


def examine_port(config: Config) -> Finding:
    """Whether the configured address can be listened on."""
    from sessile.server.listening import bind

    bind(config.server).close()
    return Finding("port", Level.OK, f"{config.server.port} of {config.server.host} is free")


def _attempt(subject: str, examination: Callable[[], Finding]) -> Finding:
    """Carry out one examination; whatever it raises is its finding."""
    try:
        return examination()
    except StartupError as error:
        return Finding(subject, Level.PROBLEM, str(error))
    except ImportError as error:
        return Finding(subject, Level.PROBLEM, f"not examined: {_first_line(error)}", "See above.")
    except Exception as error:  # the doctor reports; it does not fall ill
        return Finding(subject, Level.PROBLEM, f"{type(error).__name__}: {_first_line(error)}", "Report this as a bug.")


def _configured_model(config: Config) -> tuple[Path, ModelConfig]:
    """Where the configured model is and what it says of itself. Raises StartupError if it is not to be served."""
    path = resolve_model_path(config.model.model)
    return path, config_from_folder(path) if path.is_dir() else config_from_gguf(GgufFile(path))


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and flags; no flags where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
