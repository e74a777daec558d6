"""What cannot be in this code, whoever writes it: docs/SECURITY.md names these tests."""

import ast
import hmac
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from sessile.server.keys import Caller, Key, KeyRing, digest_of

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "sessile").rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in LIBRARY}

EVALUATES = {"eval", "exec", "compile", "__import__", "builtins"}
PLANTS_FAULTS = "sessile/sim/planting.py"
"""Compiles our own sources with a fault in them, for the simulator."""
SIMULATES = {"sessile/sim/closure.py", "sessile/sim/mutants.py", "sessile/sim/run.py"}
"""Share seeds and small worlds among processes that they fork; they serve nobody."""
UNPICKLES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch.load", "numpy.load",
    "np.load", "numpy.fromfile", "torch.jit", "torch.hub", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    ".send_pyobj", ".recv_pyobj", "multiprocessing",
}  # fmt: skip
RUNS_PROGRAMS = {"sessile/server/engine_process.py", "sessile/commands.py", "sessile/bench/cpu.py"}
"""The last one runs the engines to be compared with, as whoever calls it has written them on the command line."""
BUILDS_CORPORA = "sessile/server/corpora/builder.py"
"""Starts the builder, which is our own program as well."""
FETCHES = {
    "urllib.request", "urllib3", "requests", "aiohttp", "httpx", "http.client", "ftplib", "huggingface_hub",
    "fsspec", "smtplib",
}  # fmt: skip
CLIENTS = {
    "sessile/bench/lean_client.py", "sessile/client/async_client.py", "sessile/client/protocol.py",
    "sessile/client/sync_client.py", "sessile/client/transport.py", "sessile/commands.py", "sessile/corpora/client.py",
}  # fmt: skip
"""Programs that talk to a server whose address the person at the keyboard gives."""
SERVING = ("server", "engine", "core", "device", "text", "model", "kernels", "contract")


def called_names() -> Iterator[tuple[str, str]]:
    """File and name of everything that is called or imported anywhere in the library."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func)
            elif isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def found(words: set[str], allowed: Collection[str] = ()) -> list[tuple[str, str]]:
    """Where a name is called or imported, by itself or as the beginning of a longer one; `.name`: as the end of one."""
    return [
        (path, name)
        for path, name in called_names()
        for word in words
        if path not in allowed
        and (name.endswith(word) if word.startswith(".") else f"{name}.".startswith(f"{word}."))
    ]


def test_the_scan_sees_what_it_looks_for() -> None:
    assert {path for path, _ in found({"compile"})} == {PLANTS_FAULTS}
    assert {path for path, _ in found({"subprocess"})} == RUNS_PROGRAMS
    assert {path for path, _ in found({"multiprocessing"})} == SIMULATES
    assert found({"safe_open"}) and found({"yaml.SafeLoader"}) and found({".bind"}) and found({"httpx"})


def test_no_text_becomes_code() -> None:
    assert found(EVALUATES, {PLANTS_FAULTS}) == []


def test_nothing_is_unpickled_anywhere() -> None:
    assert found(UNPICKLES, SIMULATES) == []


def test_no_code_comes_with_a_model() -> None:
    source = "\n".join(path.read_text("utf-8") for path in LIBRARY)
    assert not re.search(r"trust_remote_code|auto_map|\.from_pretrained|hf_hub_download", source)
    assert found({"transformers"}) == []


def test_modules_are_imported_by_names_of_our_own() -> None:
    odd = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                argument = node.args[0]
                literal = isinstance(argument, ast.Constant) or ast.unparse(argument).startswith("f'sessile.")
                odd += [] if literal else [(path, ast.unparse(node))]
    known = {"sessile/doctor.py", PLANTS_FAULTS}  # names in a constant of the module; our own modules by name
    assert {path for path, _ in odd} <= known


def test_no_program_is_run_but_our_own_and_none_through_a_shell() -> None:
    assert found({"subprocess"}, RUNS_PROGRAMS) == []
    assert found({"os.system", "os.popen", "os.spawnv", "os.execv", "os.execve", "os.execvp", "os.posix_spawn"}) == []
    assert found({".create_subprocess_shell"}) == []
    assert {path for path, _ in found({".create_subprocess_exec"})} == {BUILDS_CORPORA}
    calls = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if any(keyword.arg == "shell" for keyword in call.keywords)] == []


def test_no_url_is_fetched() -> None:
    assert found(FETCHES, CLIENTS) == []
    serving = [path for path in TREES if path.split("/")[1] in SERVING]
    assert len(serving) > 60 and not CLIENTS & set(serving)


def test_sockets_between_our_processes_have_no_address_on_any_network() -> None:
    addresses = [
        (path, node.value)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"(tcp|udp|pgm)://", node.value)
    ]
    assert addresses == []
    listens = {path for path, _ in found({".create_server", ".start_server", ".bind", ".listen"})}
    # The port that was asked for; the link's path in a private folder; probes whether a port is free.
    assert listens == {
        "sessile/server/listening.py", "sessile/server/link.py", "sessile/commands.py", "sessile/doctor.py"
    }  # fmt: skip


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(tuple(Key(digest_of(f"key-{n}"), Caller(f"t{n}", is_admin=False)) for n in range(9)), ("t0",))
    compared: list[bytes] = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append(first)
        return first == second

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("key-0", "key-8", "no such key", ""):
        compared.clear()
        ring.caller_with(key)
        assert compared == [each.digest for each in ring.keys]


def test_nothing_else_compares_what_a_client_sends_as_its_key() -> None:
    compares = {path for path, _ in found({".caller_with", "digest_of", "sessile.server.keys.digest_of"})}
    assert compares == {"sessile/server/auth.py", "sessile/server/keys.py", "sessile/keyfile.py"}


def test_no_route_serves_files() -> None:
    assert found({"StaticFiles", "FileResponse", ".StaticFiles", ".FileResponse", ".sendfile"}) == []
