"""The client of a server's HTTP interface: `Client`, and `AsyncClient` for asyncio.

Both send a request again where that is safe: when no connection comes about or its reply is lost, and when the server
says to come back later. Every request has a name and a seed of its own and, in a session, says how long it believes the
history to be: a turn that was finished before its reply was lost is answered as it was, and never taken twice.
"""

from sessile.client.async_client import AsyncClient, AsyncClientSession
from sessile.client.sync_client import Client, ClientSession

__all__ = ["AsyncClient", "AsyncClientSession", "Client", "ClientSession"]
