"""Where the server listens, and for whom: TLS, a unix socket, pages of other sites, administration at a port apart."""

import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sessile.errors import StartupError
from sessile.server.config import ServerOptions
from sessile.server.listening import listening
from tests.http.conftest import Running, bearer, ring_of, running_server
from tests.http.serving import PATIENCE_S, deployed, free_port

TLS = Path(__file__).parent / "tls"
"""A certificate for localhost that signs itself, and its key: for tests, and no secret."""
PAIR = {"tls_cert": str(TLS / "cert.pem"), "tls_key": str(TLS / "key.pem")}
SITE = "https://chat.example"
ADMINISTRATION = ["/metrics", "/v1/pool", "/get_server_info", "/flush_cache"]


def refusal(**options: Any) -> str:
    """Why a server with these options does not start."""
    with pytest.raises(StartupError) as raised, listening(ServerOptions(**({"port": 0} | options))):
        raise AssertionError("it listens")
    return str(raised.value)


# -- TLS --------------------------------------------------------------------------------------------------------------


def test_with_a_certificate_only_tls_is_spoken(tmp_path: Path) -> None:
    with deployed(tmp_path, wait=False, **PAIR) as deployment:
        context = ssl.create_default_context(cafile=PAIR["tls_cert"])
        url = deployment.url.replace("http:", "https:")
        transport = httpx.HTTPTransport(verify=context, retries=20)
        with httpx.Client(transport=transport, base_url=url, timeout=PATIENCE_S) as client:
            assert client.get("/health/live").status_code == 200
            reply = client.send(client.build_request("GET", "/health/live"), stream=True)
            spoken = reply.extensions["network_stream"].get_extra_info("ssl_object").version()
        assert spoken in ("TLSv1.2", "TLSv1.3")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{deployment.url}/health/live")


@pytest.mark.parametrize("given", [{"tls_cert": PAIR["tls_cert"]}, {"tls_key": PAIR["tls_key"]}], ids=["cert", "key"])
def test_half_of_a_pair_is_refused(given: dict[str, str]) -> None:
    assert "give both, or neither" in refusal(**given)


def test_what_is_no_pair_is_refused_before_anything_starts(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    assert "No such file" in refusal(tls_cert=str(nothing), tls_key=PAIR["tls_key"])
    nothing.write_text("nothing")
    assert "cannot serve with --tls-cert" in refusal(tls_cert=str(nothing), tls_key=PAIR["tls_key"])


# -- a unix socket ----------------------------------------------------------------------------------------------------


def test_a_unix_socket_is_for_its_user_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "sessile.sock"
    with listening(ServerOptions(unix_socket=str(path))):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600 and path.stat().st_uid == os.getuid()
    assert not path.exists()


def test_a_server_answers_at_its_unix_socket_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "sessile.sock"
    with deployed(tmp_path, wait=False, unix_socket=str(path)) as deployment:
        transport = httpx.HTTPTransport(uds=str(path), retries=20)
        with httpx.Client(transport=transport, base_url="http://sessile", timeout=PATIENCE_S) as client:
            assert client.get("/health/live").status_code == 200
            assert client.get("/get_server_info").status_code in (200, 503)
        with pytest.raises(httpx.ConnectError):
            httpx.get(deployment.url)


def test_a_socket_that_a_dead_server_left_is_taken_over_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "sessile.sock")
    with listening(ServerOptions(unix_socket=path)) as sockets:
        assert "it is in use" in refusal(unix_socket=path)
        left = sockets[0].dup()
        sockets[0].close()
        left.close()
        assert Path(path).exists()
        with listening(ServerOptions(unix_socket=path)):
            assert Path(path).exists()


def test_a_file_is_never_taken_for_a_socket_that_was_left(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    assert "it is in use" in refusal(unix_socket=str(path))
    assert path.read_text() == "mine"


# -- pages of other sites ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_to_a_site() -> Iterator[Running]:
    with running_server(cors_origin=f"{SITE}, http://localhost:3000") as server:
        yield server


def asked(server: Running, origin: str) -> httpx.Response:
    wanted = {"origin": origin, "access-control-request-method": "POST"}
    return server.client.options("/generate", headers=wanted)


@pytest.mark.parametrize("origin", [SITE, "http://localhost:3000"])
def test_a_page_of_a_site_that_was_named_may_send_and_read(open_to_a_site: Running, origin: str) -> None:
    assert asked(open_to_a_site, origin).headers["access-control-allow-origin"] == origin
    sent = open_to_a_site.client.post("/generate", json={"text": "hi"}, headers={"origin": origin})
    assert sent.status_code == 200 and sent.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", ["https://evil.example", f"{SITE}.evil.example", "http://chat.example", "null"])
def test_a_page_of_any_other_site_may_not(open_to_a_site: Running, origin: str) -> None:
    assert "access-control-allow-origin" not in asked(open_to_a_site, origin).headers
    sent = open_to_a_site.client.post("/generate", json={"text": "hi"}, headers={"origin": origin})
    assert sent.status_code == 403 and "access-control-allow-origin" not in sent.headers


@pytest.mark.parametrize("named", ["*", "chat.example", f"{SITE}/", f"{SITE}/chat", "file://"])
def test_what_names_no_single_site_is_refused(named: str) -> None:
    assert "is no site" in refusal(cors_origin=named)


# -- administration apart ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart() -> Iterator[Running]:
    """A server whose administration is said to be at another port than the one that it listens on."""
    with running_server(key_ring=ring_of(ops="admin"), admin_port=1) as server:
        yield server


@pytest.mark.parametrize("path", ADMINISTRATION)
@pytest.mark.parametrize("host", ["localhost", "localhost:1"])
def test_administration_is_not_found_at_the_port_for_everybody(apart: Running, path: str, host: str) -> None:
    reply = apart.client.get(path, headers=bearer("ops") | {"host": host})
    assert reply.status_code == 404


def test_no_key_is_an_administrators_at_the_port_for_everybody(apart: Running) -> None:
    reply = apart.client.post("/abort_request", json={"abort_all": True}, headers=bearer("ops"))
    assert reply.status_code == 403
    assert apart.client.post("/generate", json={"text": "hi"}, headers=bearer("ops")).status_code == 200


def test_administration_answers_at_its_own_port(tmp_path: Path) -> None:
    port = free_port()
    with deployed(tmp_path, admin_port=port) as deployment:
        shown = {at: httpx.get(f"{at}/v1/pool", timeout=PATIENCE_S).status_code
                 for at in (deployment.url, f"http://127.0.0.1:{port}")}  # fmt: skip
        assert list(shown.values()) == [404, 200]


def test_administration_at_the_port_for_everybody_is_refused_as_that() -> None:
    assert "--admin-port and --port are both" in refusal(port=(port := free_port()), admin_port=port)


def test_an_administrators_port_in_use_is_refused_by_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another with --admin-port" in refusal(admin_port=taken.getsockname()[1])


def test_beside_a_unix_socket_administration_may_be_at_any_port(tmp_path: Path) -> None:
    port = free_port()
    with listening(ServerOptions(unix_socket=str(tmp_path / "socket"), port=port, admin_port=port)) as listeners:
        assert len(listeners) == 2


# -- room for connections ---------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit() -> Iterator[tuple[int, int]]:
    """That of this process, put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_as_many_files_may_be_open_as_there_may_be_connections(file_limit: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, file_limit[1]))
    with listening(ServerOptions(port=0, connections_max=300)):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300 + 512


def test_more_connections_than_the_system_allows_are_refused_with_the_remedy() -> None:
    assert "LimitNOFILE" in refusal(connections_max=1_000_000_000)
