"""Put the parts of the service together, from the settings of a server."""

from collections.abc import Sequence
from pathlib import Path

from sessile.server.config import ServerOptions
from sessile.server.corpora.budget import Budget, CorpusLimits
from sessile.server.corpora.builder import BuilderLink
from sessile.server.corpora.folder import StateFolder
from sessile.server.corpora.store import CorpusStore
from sessile.server.keys import KeyRing
from sessile.server.link import EngineLink
from sessile.text.tokenizer import Tokenizer


def open_corpora(
    link: EngineLink,
    tokenizer: Tokenizer,
    options: ServerOptions,
    folder: StateFolder,
    builder: Sequence[str],
    builder_config: str,
    *,
    key_ring: KeyRing | None = None,
) -> CorpusStore:
    """The store of corpora; takes the folder over. builder, builder_config: as of BuilderLink. Needs a running loop."""
    return CorpusStore(
        link,
        BuilderLink(builder, builder_config),
        folder,
        Budget(
            CorpusLimits(options.corpora_tokens_max, options.corpora_bytes_max),
            key_ring.corpus_limits if key_ring else {},
        ),
        tokenizer=tokenizer.fingerprint(),
        corpora_max=options.corpora_max,
        sources=Path(options.corpora_dir).expanduser() if options.corpora_dir else None,
    )
