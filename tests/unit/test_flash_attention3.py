"""FlashAttention-3 is found without importing who brings it, bound by its arguments' names, and refused in one line."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sessile.kernels import flash_attention3
from sessile.kernels.flash_attention3 import FlashAttention3, ListedRows, Package, available_flash_attention3, unsuited
from tests.kernels.fake_flash import PACKAGES, declared, fake_flash_attention3, schema

look = available_flash_attention3.__wrapped__


def installed(folder: Path, package: Package) -> None:
    """A Python package that must not be imported, with a file where the library would lie."""
    library = folder / package.python / package.file_pattern.replace("*", ".abi3")
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library at all")
    (folder / package.python / "__init__.py").write_text("raise SystemExit('imported')")


def test_without_a_package_it_is_said_what_would_bring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert look().kernels is None
    assert look().found == "FlashAttention-3 is not installed"
    assert "sglang-kernel" in look().remedy


def test_a_library_of_another_build_is_named_with_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, flash_attention3.PACKAGES[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    available = look()
    assert available.kernels is None
    assert available.found.startswith("FlashAttention-3 cannot be loaded (sglang-kernel: ")
    assert "built for this torch" in available.remedy
    assert "\n" not in available.found
    assert "sgl_kernel" not in sys.modules


def test_the_first_that_can_be_loaded_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Package(name, f"python_{index}", "library*.so", f"sessile_{name.replace('-', '_')}")
        for index, name in enumerate(PACKAGES)
    ]
    for package in found:
        installed(tmp_path, package)
        fake_flash_attention3(package.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(flash_attention3, "PACKAGES", found)
    loaded: list[str] = []

    def load(path: str) -> None:
        loaded.append(Path(path).parent.name)
        if len(loaded) == 1:
            raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", load)
    available = look()
    assert available.kernels is not None
    assert available.kernels.name == PACKAGES[1]
    assert loaded == ["python_0", "python_1"]


@pytest.mark.parametrize(
    ("namespace", "text", "message"),
    [
        ("sessile_newer", schema("vllm").replace("int cp_rank", "int colour"), "arguments colour"),
        ("sessile_unpaged", "fwd(Tensor q, Tensor k, Tensor v, Tensor? seqused_q, Tensor? out) -> Tensor",
         "arguments kv_batch_idx, page_table"),
    ],
)  # fmt: skip
def test_an_operator_with_arguments_that_we_do_not_know_is_not_called(namespace: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashAttention3("other", declared(namespace, text))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "remedy"),
    [
        (128, torch.bfloat16, (9, 0), ""),
        (64, torch.float16, (9, 0), ""),
        (128, torch.bfloat16, (8, 0), "Hopper GPUs alone"),
        (128, torch.bfloat16, (10, 0), "Hopper GPUs alone"),
        (128, torch.bfloat16, None, "Hopper GPUs alone"),
        (128, torch.float32, (9, 0), "does not compute in float32. Use --dtype bfloat16 or --attention triton"),
        (80, torch.bfloat16, (9, 0), "no kernels for heads of 80 dimensions, only of 64, 96, 128, 192, 256"),
    ],
)
def test_what_it_cannot_attend_with_is_refused_with_a_remedy(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, remedy: str
) -> None:
    fault = unsuited(head_dim, dtype, capability)
    assert remedy in fault
    assert bool(fault) == bool(remedy)


@pytest.mark.parametrize(
    ("tokens", "rows", "heads", "kv_heads", "splits"),
    [
        (8192, 1, 32, 8, 1),
        (8192, 64, 32, 8, 1),
        (512, 64, 32, 8, 1),  # chunks make 8 × 14 tiles
        (512, 64, 12, 2, None),  # and 2 × 21 here
        (1152, 1024, 32, 8, None),  # nearly all of it may be decoding rows
        (128, 8, 12, 2, 0),
        (64, 8, 12, 2, None),
    ],
)
def test_it_attends_where_prompts_fill_the_gpu_or_few_rows_may_be_split(
    tokens: int, rows: int, heads: int, kv_heads: int, splits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: h100)
    assert fake_flash_attention3("vllm").splits(tokens, rows, heads, kv_heads) == splits


def test_an_argument_that_only_a_newer_version_has_keeps_its_own_default() -> None:
    given: list[Any] = []

    class Newer:
        _schema = declared("sessile_next", schema("vllm").replace("? cp_tot_seqused_k", "? rest, int colour=3"))._schema

        def __call__(self, *arguments: Any) -> None:
            given.extend(arguments)

    query, pool, table = torch.zeros(4, 2, 64), torch.zeros(32, 1, 64), torch.zeros((1, 2), dtype=torch.int32)
    listed = ListedRows.empty(1, 4, query.device)
    FlashAttention3("next", Newer()).attend(query, pool, pool, table, listed, 16, query)
    assert given[-2:] == [None, 3]
