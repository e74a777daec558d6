"""An engine that dies or stands still is replaced: clients are told, the server goes on, and sessions with it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from sessile.server.histories import SESSION_BYTES
from tests.http.serving import PATIENCE_S, Deployment, deployed, wait_until_healthy
from tests.http.test_processes import Streaming, gone

STALL_S = 2
"""Watched closely, so that tests are quick; a machine that is loaded stops nobody for so long at a time."""
TURN = {"sampling_params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}}


def ask(deployment: Deployment, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{deployment.url}{path}", json=body, timeout=PATIENCE_S)


def health(deployment: Deployment, kind: str) -> int:
    return httpx.get(f"{deployment.url}/health/{kind}", timeout=PATIENCE_S).status_code


def turn(deployment: Deployment, session: str, text: str, **fields: Any) -> httpx.Response:
    return ask(deployment, "/generate", text=text, session_params={"id": session}, **TURN, **fields)


def tokens_of(deployment: Deployment, session: str) -> httpx.Response:
    return httpx.get(f"{deployment.url}/v1/sessions/{session}/tokens", timeout=PATIENCE_S)


def replaced(deployment: Deployment, number: int) -> None:
    """End the engine by a signal, and wait until another one answers."""
    engine = deployment.engine_pid()
    os.kill(engine, number)
    deadline_s = time.monotonic() + PATIENCE_S
    while not gone(engine):
        assert time.monotonic() < deadline_s, "the engine is still there"
        time.sleep(0.02)
    wait_until_healthy(deployment)
    assert deployment.engine_pid() != engine


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_session_goes_on_in_the_next_engine(tmp_path: Path, number: int) -> None:
    with deployed(tmp_path, mode="toy") as deployment, deployed_twin(tmp_path) as twin:
        for each in (deployment, twin):
            ask(each, "/open_session", capacity_of_str_len=1, streaming=True, session_id="s")
            turn(each, "s", "Once upon")
        replaced(deployment, number)
        assert tokens_of(deployment, "s").json() == tokens_of(twin, "s").json()
        after = [turn(each, "s", " a time").json() for each in (deployment, twin)]
        assert after[0]["output_ids"] == after[1]["output_ids"]
        assert after[0]["meta_info"]["cached_tokens"] == 0, "its KV went with the engine"


def deployed_twin(folder: Path) -> Any:
    """A deployment that nothing happens to."""
    (folder / "twin").mkdir()
    return deployed(folder / "twin", mode="toy")


def test_h54_an_engine_that_stands_still_is_replaced_and_its_streams_are_told(tmp_path: Path) -> None:
    with deployed(tmp_path, stall_timeout_s=STALL_S, health_timeout_s=0.5) as deployment:
        client = Streaming(deployment)
        engine = deployment.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        assert health(deployment, "ready") == 503, "nothing answers"
        assert health(deployment, "live") == 200, "the server does, and will see to it"
        client.join(PATIENCE_S)
        assert "stood still for 2 s" in client.lines[-2] and client.lines[-1] == "data: [DONE]"
        wait_until_healthy(deployment)
        assert gone(engine) and deployment.engine_pid() != engine
        assert ask(deployment, "/generate", text="a", sampling_params={"max_new_tokens": 2}).status_code == 200


def test_an_engine_that_is_given_up_says_where_it_was(tmp_path: Path) -> None:
    with deployed(tmp_path, mode="toy", stall_timeout_s=STALL_S, log_format="json") as deployment:
        os.kill(deployment.engine_pid(), signal.SIGSTOP)
        deadline_s = time.monotonic() + PATIENCE_S
        while "starting another engine" not in deployment.said() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert '"stacks":"' in deployment.said() and "loop.py" in deployment.said()


def test_a_server_that_was_stopped_itself_does_not_take_its_engine_for_stuck(tmp_path: Path) -> None:
    with deployed(tmp_path, stall_timeout_s=STALL_S) as deployment:
        engine = deployment.engine_pid()
        deployment.process.send_signal(signal.SIGSTOP)
        time.sleep(2 * STALL_S)
        deployment.process.send_signal(signal.SIGCONT)
        wait_until_healthy(deployment)
        assert deployment.engine_pid() == engine


def test_an_engine_that_falls_again_and_again_ends_the_server(tmp_path: Path) -> None:
    with deployed(tmp_path, engine_restarts_max=1) as deployment:
        replaced(deployment, signal.SIGKILL)
        os.kill(deployment.engine_pid(), signal.SIGKILL)
        assert deployment.process.wait(PATIENCE_S) == 1
        assert "fallen 2 times within 10 minutes" in deployment.said()


def test_the_turns_of_a_branching_session_can_be_gone_on_from_in_the_next_engine(tmp_path: Path) -> None:
    def branch(deployment: Deployment, rid: str, parent: str | None) -> list[int]:
        params = {"id": "b", "rid": parent}
        reply = ask(deployment, "/generate", text=f"turn {rid}", rid=rid, session_params=params, **TURN)
        assert reply.status_code == 200, reply.text
        tokens: list[int] = reply.json()["output_ids"]
        return tokens

    with deployed(tmp_path, mode="toy") as deployment, deployed_twin(tmp_path) as twin:
        for each in (deployment, twin):
            ask(each, "/open_session", capacity_of_str_len=1, session_id="b")
            branch(each, "root", None)
            branch(each, "left", "root")
        replaced(deployment, signal.SIGKILL)
        for rid, parent in (("left", "root"), ("right", "root"), ("further", "left"), ("apart", None)):
            assert branch(deployment, rid, parent) == branch(twin, rid, parent), rid


def test_a_session_that_was_not_held_is_gone_with_its_engine_and_says_so(tmp_path: Path) -> None:
    with deployed(tmp_path, mode="toy", held_bytes_max=0) as deployment:
        ask(deployment, "/open_session", capacity_of_str_len=1, streaming=True, session_id="s")
        replaced(deployment, signal.SIGKILL)
        lost = tokens_of(deployment, "s")
        assert lost.status_code == 410 and "lost when the engine was restarted" in lost.json()["error"]["message"]
        native = turn(deployment, "s", "Once")
        assert native.status_code == 400 and "lost when" in native.json()["error"]["message"]
        assert ask(deployment, "/close_session", session_id="s").status_code == 200
        assert tokens_of(deployment, "s").status_code == 404


def test_h59_a_reply_that_was_lost_with_the_engine_is_said_again(tmp_path: Path) -> None:
    with deployed(tmp_path, mode="toy") as deployment:
        ask(deployment, "/open_session", capacity_of_str_len=1, streaming=True, session_id="s")
        first = turn(deployment, "s", "Once upon", rid="one").json()
        replaced(deployment, signal.SIGKILL)
        again = turn(deployment, "s", "Once upon", rid="one").json()
        assert again["output_ids"] == first["output_ids"]
        assert len(tokens_of(deployment, "s").json()["tokens"]) == len("Once upon") + 6


def test_what_happened_to_engines_and_sessions_is_counted(tmp_path: Path) -> None:
    room = 2 * SESSION_BYTES + 4 * 150  # for the tokens of either, and not of both
    with deployed(tmp_path, mode="toy", held_bytes_max=room) as deployment:
        ask(deployment, "/open_session", capacity_of_str_len=1, streaming=True, session_id="kept")
        ask(deployment, "/open_session", capacity_of_str_len=1, streaming=True, session_id="older")
        for session, tokens in (("older", 100), ("kept", 60)):
            turn(deployment, session, "x" * tokens)
        replaced(deployment, signal.SIGKILL)
        shown = httpx.get(f"{deployment.url}/metrics", timeout=PATIENCE_S).text
        for figure in ("engine_restarts_total", "sessions_restored_total", "sessions_lost_total", "held_sessions"):
            assert f'sessile_{figure}{{model_name="toy"}} 1.0' in shown
