"""The commands of docs/OPERATIONS.md, run as they stand in one shell, against a server that they start and stop."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http.serving import free_port
from tests.unit.tiny_folder import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "OPERATIONS.md").read_text("utf-8")
SHOWN_ADDRESS = "127.0.0.1:30000"
PATIENCE_S = 240
"""Kernels may have to be compiled first."""
MARK = "---- next block ----"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with `sessile` on the path and a model that loads in no time."""
    folder = tmp_path_factory.mktemp("operations")
    (folder / "model").mkdir()
    write_tiny_model(folder / "model")
    (folder / "bin").mkdir()
    program = folder / "bin" / "sessile"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sessile "$@"\n')
    program.chmod(0o755)
    return folder


def blocks_run(folder: Path) -> list[str]:
    """What each block of commands prints, run one after the other in one shell on a port of its own."""
    port = free_port()
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    # A server that outlived a command that failed would hold the pipes, and what failed would be known when time is up.
    script = "trap 'kill $(jobs -p) || true' EXIT\n" + f"echo '{MARK}'\n".join(blocks)
    script = script.replace(SHOWN_ADDRESS, f"127.0.0.1:{port}")
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SESSILE_PORT": str(port),
        "SESSILE_MODEL": str(folder / "model"),
        "SESSILE_LOAD_FORMAT": "dummy",
    }
    shell = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        said, complained = shell.communicate(timeout=PATIENCE_S)
    finally:
        # The server must not outlive a shell that failed in the middle.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)
        shell.wait()
    log = folder / "sessile.log"
    assert shell.returncode == 0, complained + said + (log.read_text() if log.exists() else "")
    return said.split(f"{MARK}\n")


def test_the_commands_of_the_page_start_look_at_and_stop_a_server(shell: Path) -> None:
    started, looked, asked, stopped = blocks_run(shell)
    assert (started, stopped) == ("", "")
    health, generated, metrics, *rest = looked.split("\n", 3)
    assert (health, generated) == ("200", "200") and int(metrics) > 100
    server, end = json.JSONDecoder().raw_decode(rest[0])
    pool = json.loads(rest[0][end:])
    assert server["draining"] is False and server["settings"]["server"]["keys"] == "keys.yaml"
    assert sum(pages for owner, pages in pool["pages"].items() if owner != "total") == pool["pages"]["total"]
    answer, end = json.JSONDecoder().raw_decode(asked)
    line = json.loads(asked[end:])
    assert answer["meta_info"]["id"] == line["rid"] == "first"
    assert (line["tenant"], line["status"]) == ("acme", 200)
    assert line["completion_tokens"] == answer["meta_info"]["completion_tokens"] > 0
    assert "sk-sessile" not in (shell / "keys.yaml").read_text() + (shell / "sessile.log").read_text()
