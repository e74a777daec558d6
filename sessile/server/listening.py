"""Where the server listens: addresses, a unix socket, TLS; everything is taken before anything else starts."""

import contextlib
import errno
import ipaddress
import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from sessile.errors import StartupError
from sessile.server.config import ServerOptions

BACKLOG = 2048
OTHER_FILES = 512
"""Files beside connections: the model, indexes of corpora, pipes, sockets between our processes."""
SOCKET_UMASK = 0o177
"""Of a unix socket: read and write for the server's user, nothing for anybody else."""


@contextlib.contextmanager
def listening(options: ServerOptions) -> Iterator[list[socket.socket]]:
    """The listening sockets, the one for everybody first; closed on leaving, and a unix socket's path removed.

    Raises StartupError in one line that says what to do.
    """
    check_ports(options)
    check_tls(options)
    allowed_origins(options)
    allow_connections(options.connections_max)
    with contextlib.ExitStack() as stack:
        if options.unix_socket is not None:
            sockets = [bind_path(Path(options.unix_socket))]
            stack.callback(Path(options.unix_socket).unlink, missing_ok=True)
        else:
            sockets = [bind(options)]
        stack.enter_context(sockets[0])
        if options.admin_port is not None:
            sockets.append(stack.enter_context(bind(options, options.admin_port)))
        yield sockets


def allow_connections(connections_max: int) -> None:
    """Let this process have so many connections open; StartupError where the system does not allow it.

    Beyond its limit of open files a process cannot even refuse a connection.
    """
    wanted = connections_max + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise StartupError(
                f"--connections-max {connections_max} needs {wanted} open files and {hard} are allowed: lower it to "
                f"{max(1, hard - OTHER_FILES)}, or raise the limit (ulimit -Hn, LimitNOFILE)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(options: ServerOptions, port: int | None = None) -> socket.socket:
    """A listening socket on that port for administration, or on the one for everybody. Raises StartupError."""
    host, flag = options.host, "--port" if port is None else "--admin-port"
    port = options.port if port is None else port
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    is_loopback = ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback
    if not is_loopback and options.keys is None and options.allow_remote == "off":
        raise StartupError(
            f"--host {host} lets other machines in, and whoever reaches the port can use the server: require keys with "
            "--keys FILE, put a proxy that authenticates in front of 127.0.0.1, or add --allow-remote on"
        )
    try:
        return socket.create_server((str(where[0]), port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} of {host} is in use: stop what listens there, or choose another with {flag}"
            ) from error
        raise StartupError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from error


def bind_path(path: Path) -> socket.socket:
    """A listening unix socket that only our user may open. One that a dead server left behind is replaced.

    Raises StartupError, also where a living server, or anything but a socket, has the path.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(SOCKET_UMASK)  # before it is there, so that it is never open to others
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _is_served(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise StartupError(f"cannot listen on --unix-socket {path}: {reason}") from error
    finally:
        os.umask(umask)
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def check_ports(options: ServerOptions) -> None:
    """Raise StartupError if administration is to be apart and at the same port."""
    if options.unix_socket is None and options.admin_port == options.port:
        raise StartupError(f"--admin-port and --port are both {options.port}: choose another for one of them")


def check_tls(options: ServerOptions) -> None:
    """Raise StartupError unless certificate and key are both left out, or there and a pair."""
    if options.tls_cert is None and options.tls_key is None:
        return
    if options.tls_cert is None or options.tls_key is None:
        raise StartupError("--tls-cert and --tls-key go together: give both, or neither")
    try:
        # No passphrase: asked for one, OpenSSL would wait at a terminal that is not there.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key, lambda: "")
    except (OSError, ValueError) as error:
        raise StartupError(
            f"cannot serve with --tls-cert {options.tls_cert} and --tls-key {options.tls_key}: {error}"
        ) from error


def allowed_origins(options: ServerOptions) -> frozenset[str]:
    """The sites of --cors-origin. Raises StartupError for what is none: each is named, there is no way to name all."""
    origins = frozenset(part.strip() for part in (options.cors_origin or "").split(",") if part.strip())
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise StartupError(f"--cors-origin {origin} is no site: write https://chat.example, or several with commas")
    return origins


def shown_address(listener: socket.socket, options: ServerOptions) -> str:
    """A URL of the socket, or its path."""
    if options.unix_socket is not None:
        return f"unix:{options.unix_socket}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if options.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
