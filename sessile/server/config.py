"""Settings of the HTTP server."""

from dataclasses import dataclass

from sessile.options import option


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens and how it treats its clients."""

    host: str = option(
        "127.0.0.1", "Address to listen on; only loopback addresses unless --keys is given or --allow-remote is on."
    )
    port: int = option(30000, "Port to listen on; 0 picks a free one.", low=0, high=65535)
    allow_remote: str = option(
        "off",
        "Listen on other addresses than loopback without --keys: whoever reaches the port can use the server.",
        choices=("on", "off"),
    )
    unix_socket: str | None = option(
        None,
        "Listen on a unix socket at this path, which only the server's user may open, instead of on an address.",
    )
    admin_port: int | None = option(
        None,
        "Port of the same host for administration. Elsewhere its routes are not found then, and no key is an"
        " administrator's. Default: one port for all.",
        low=1,
        high=65535,
    )
    tls_cert: str | None = option(
        None, "PEM file of the certificate, and of those above it, to serve HTTPS with; needs --tls-key."
    )
    tls_key: str | None = option(None, "PEM file of the private key of --tls-cert, without a passphrase.")
    cors_origin: str | None = option(
        None,
        "Sites whose pages may use this server from a browser, separated by commas: https://chat.example. Default:"
        " none may, and no CORS header is sent.",
    )
    keys: str | None = option(
        None,
        "YAML file of the keys that are accepted, the tenants they stand for and their limits (docs/HTTP.md); with it,"
        " every request needs a key. `sessile key` draws one. Default: no key is needed, all are one tenant.",
    )
    served_name: str | None = option(
        None,
        "Name of the model in /v1/models and in requests; default: the name of its file or folder.",
        aliases=("served-model-name",),
    )
    tool_format: str = option(
        "auto",
        "How the model writes calls of tools: hermes (Qwen's as well), llama3 or pythonic. auto: as its chat template"
        " says; a model whose template knows no tools is told to write them as hermes. none: tools are refused.",
        choices=("auto", "hermes", "llama3", "pythonic", "none"),
    )
    reasoning_format: str = option(
        "auto",
        "How the model marks its reasoning: think (<think>…</think>), which is then told apart from the answer. auto:"
        " as its chat template says. none: reasoning is part of the answer.",
        choices=("auto", "think", "none"),
    )
    log_format: str = option(
        "text",
        "Format of the log on standard error: lines for people or one JSON object a line.",
        choices=("text", "json"),
    )
    log_level: str = option(
        "info",
        "Least level that is logged; every finished request is one line at level info.",
        choices=("debug", "info", "warning", "error"),
    )
    otlp_endpoint: str | None = option(
        None,
        "URL of an OpenTelemetry collector to send a span of each request to (http://127.0.0.1:4318/v1/traces); goes on"
        " in the trace of a traceparent header. Needs the packages of sessile[otel]. Default: nothing is traced.",
    )
    request_log: str | None = option(
        None,
        "File to append what is asked of the engine to, for `python -m sessile.sim replay FILE`: kinds, times, lengths"
        " and which prompts begin alike; no text, no token, no name. Default: none.",
    )
    body_bytes_max: int = option(
        33_554_432,
        "Largest request body; a larger one is refused with 413 while it is read.",
        unit="bytes",
        low=1024,
        high=1 << 30,
    )
    stream_lag_tokens_max: int = option(
        4096,
        "Tokens that may wait for a client that reads its stream slowly; beyond, its request is ended.",
        unit="tokens",
        low=1,
        high=1 << 24,
    )
    health_timeout_s: float = option(
        10.0,
        "How long /health and the figures of /metrics wait for the step loop to answer.",
        unit="seconds",
        low=0.1,
        high=600,
    )
    dialogue_idle_timeout_s: float = option(
        3600.0,
        "Idle time after which a chat session that its name opened, a conversation and stored responses are forgotten.",
        unit="seconds",
        low=1,
        high=31_536_000,
    )
    responses_max: int = option(
        10_000,
        "Most stored responses of a tenant, and most conversations; beyond, those used least recently are forgotten.",
        unit="responses",
        low=1,
        high=10_000_000,
    )
    responses_bytes_max: int = option(
        67_108_864,
        "Most text of a tenant's stored responses, and of its conversations, as JSON; forgotten as above.",
        unit="bytes",
        low=1024,
        high=1 << 40,
    )
    corpora_dir: str | None = option(
        None,
        "Folder of texts that clients may name as corpora, and that is otherwise left alone; what is loaded is kept in"
        " .sessile below it and is there again after a restart. Default: no paths, and corpora go with the server.",
    )
    corpora_max: int = option(
        1000,
        "Most corpora at once, loading ones included; one more is refused with 429.",
        unit="corpora",
        low=1,
        high=100_000,
    )
    corpora_tokens_max: int = option(
        100_000_000,
        "Most tokens of all corpora together; a corpus that exceeds it is refused. Tenants may have less, see --keys.",
        unit="tokens",
        low=0,
        high=1 << 40,
    )
    corpora_bytes_max: int = option(
        1 << 30,
        "Most memory for the indexes of all corpora together, 8 bytes a token; the same on the disk.",
        unit="bytes",
        low=0,
        high=1 << 44,
    )
    connections_max: int = option(
        3000,
        "Most connections at once; one more is answered with 503 and closed. The limit of open files is raised to it,"
        " as far as the system allows (ulimit -Hn).",
        unit="connections",
        low=1,
        high=1_000_000,
    )
    queue_timeout_s: float | None = option(
        None,
        "How long a request may wait for its first step; then it is refused with 503. Default: as long as it takes.",
        unit="seconds",
        low=0.01,
        high=86_400,
    )
    request_timeout_s: float | None = option(
        None,
        "How long a request may take in all; then it ends as an abort with what it has said. Default: as long as it"
        " takes.",
        unit="seconds",
        low=0.01,
        high=86_400,
    )
    stream_keep_alive_s: float = option(
        15.0,
        "A stream in which nothing was sent for so long sends a comment, so that no proxy takes it for dead.",
        unit="seconds",
        low=0.01,
        high=3600,
    )
    stall_timeout_s: float = option(
        60.0,
        "How long the engine may have work and get nowhere, or not answer, before it is ended and another is started;"
        " its requests fail with 503. Longer than the longest step.",
        unit="seconds",
        low=1,
        high=86_400,
    )
    engine_restarts_max: int = option(
        5,
        "How often within ten minutes an engine that died or stood still is replaced; one more, and the server ends"
        " with status 1. 0: the server ends with its first engine.",
        unit="restarts",
        low=0,
        high=1000,
    )
    held_bytes_max: int = option(
        256 << 20,
        "Memory for the tokens of open sessions, 4 bytes each, so that they go on after the engine was replaced; those"
        " used longest ago are let go of first, and are lost then. 0: all are.",
        unit="bytes",
        low=0,
        high=1 << 44,
    )
    drain_notice_s: float = option(
        0.0,
        "After SIGTERM or Ctrl-C, how long /health says 503 while requests are still taken, so that a load balancer has"
        " noticed before the first one is refused.",
        unit="seconds",
        low=0,
        high=3600,
    )
    drain_timeout_s: float = option(
        30.0,
        "How long running requests may go on after SIGTERM or Ctrl-C before they are aborted.",
        unit="seconds",
        low=0,
        high=86_400,
    )
    engine_start_timeout_s: float = option(
        600.0,
        "How long the engine may take to load its model before the server gives up.",
        unit="seconds",
        low=1,
        high=86_400,
    )
