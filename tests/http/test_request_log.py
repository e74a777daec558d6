"""What a running server notes of its requests is what the simulator plays, and says nothing of anybody."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from sessile.sim.log_lines import SubmitLine, read_log
from sessile.sim.replay import replay
from tests.http.serving import PATIENCE_S, Deployment, deployed

SECRET = "rosebud"


def converse(deployment: Deployment, number: int) -> None:
    """One client: a session of three turns with a common beginning, a fork of it, and a plain request."""
    with httpx.Client(base_url=deployment.url, timeout=PATIENCE_S) as client:
        session = f"{SECRET}-{number}"
        wish = {"sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
        client.post("/open_session", json={"capacity_of_str_len": 1, "streaming": True, "session_id": session})
        for text in (SECRET * 20, " again", " and again"):
            reply = client.post("/generate", json={"text": text, "session_params": {"id": session}, **wish})
            assert reply.status_code == 200
        assert client.post(f"/v1/sessions/{session}/fork", json={"id": f"{session}-fork"}).status_code == 200
        assert client.post("/generate", json={"text": SECRET, **wish}).status_code == 200
        client.post("/close_session", json={"session_id": session})


def test_what_a_server_was_asked_is_replayed_and_nothing_is_told_of_anybody(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    with deployed(tmp_path, mode="toy", request_log=str(path)) as deployment:
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda number: converse(deployment, number), range(4)))
        deployment.process.terminate()
        assert deployment.process.wait(PATIENCE_S) == 0
    assert SECRET not in path.read_text()
    lines = read_log(path)
    firsts = [line.prefixes for line in lines if isinstance(line, SubmitLine) and len(line.prefixes) == 3]
    assert len(firsts) == 4 and firsts[0] == firsts[1] == firsts[2] == firsts[3], "they begin alike"
    report = replay(lines)
    assert report.failure is None, report.failure
    assert (report.totals["Submit"], report.totals["ForkSession"], report.totals["CloseSession"]) == (16, 4, 4 + 4)
