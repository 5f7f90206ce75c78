"""What a server allows, and who may ask it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from handful.errors import ConfigError

__all__ = ["ServerSettings", "is_loopback"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server's settings; those of its engine are the engine's.

    name            of the model, as clients ask for it.
    host, port      where it listens; port 0: any that is free.
    api_key         that a client must show. Needed unless the host is this computer's own loopback, or `no_auth`.
    origins         of web pages that may ask it from a browser; "*": any.
    queue           choices that may wait while the engine is full; those beyond are refused with 429.
    max_body        bytes of a request.
    max_batch       choices of a request: prompts × n.
    max_output      tokens of a choice; None: what the model's context has room for.
    max_routed      bytes of routing that a request may be told, of all its choices.
    max_requests    that are open at a time.
    quiet_seconds   after which a stream without news sends a comment, so that nobody takes it for dead.
    patience        seconds that a client may take to send a request, or to take what it is sent.

    ConfigError for what cannot be.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    no_auth: bool = False
    origins: tuple[str, ...] = ()
    queue: int = 256
    max_body: int = 4 << 20
    max_batch: int = 128
    max_output: int | None = None
    max_routed: int = 64 << 20
    max_requests: int = 1024
    quiet_seconds: float = 15.0
    patience: float = 60.0

    def __post_init__(self) -> None:
        least_of = {"queue": 0, "max_body": 1, "max_batch": 1, "max_output": 1, "max_routed": 0, "max_requests": 1}
        for field, least in least_of.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigError(f"{field} = {value}: at least {least}")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port = {self.port}: from 0 to 65535")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ConfigError("api_key: ASCII characters, at least one, no spaces around them")
        if self.api_key is not None and self.no_auth:
            raise ConfigError("no_auth: with an api_key there is nothing to leave open; give one of them")
        if self.api_key is None and not self.no_auth and not is_loopback(self.host):
            raise ConfigError(
                f"host = {self.host!r}: others can reach it; give a key by --api-key or HANDFUL_API_KEY, or --no-auth"
            )


def is_loopback(host: str) -> bool:
    """Whether a host, as a socket or a Host header has it, is this computer's own."""
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
