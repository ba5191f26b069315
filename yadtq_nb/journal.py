"""Entries of the jobs topic, manifests, seals and the like: from them an emptied workbench is filled again."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from yadtq_nb import codec
from yadtq_nb.errors import FormatError
from yadtq_nb.model import Cancel, Manifest, Reopen, Seal

__all__ = ["Blob", "Cancel", "Entry", "Manifest", "Reopen", "Seal", "decode", "encode"]

_KIND: Final = b"j"


class Blob(msgspec.Struct, frozen=True):
    """A function or a source tree, by its content hash."""

    name: str
    data: bytes


Entry: TypeAlias = "Manifest | Reopen | Seal | Cancel | Blob"

_TYPES: Final[dict[str, type[Manifest] | type[Reopen] | type[Seal] | type[Cancel] | type[Blob]]] = {
    "manifest": Manifest,
    "reopen": Reopen,
    "seal": Seal,
    "cancel": Cancel,
    "blob": Blob,
}


def encode(secret: bytes, entry: Entry) -> tuple[str, bytes]:
    """Return an entry's key and sealed value. The last value of a key is the one that counts."""
    kind = next(kind for kind, cls in _TYPES.items() if isinstance(entry, cls))
    name = entry.name if isinstance(entry, Blob) else entry.id
    if isinstance(entry, Reopen):
        name += f"/{entry.life}"  # each tells something of its own
    return f"{kind}/{name}", codec.seal(secret, _KIND, msgspec.msgpack.encode(entry))


def decode(secret: bytes, key: str, value: bytes) -> Entry:
    """Verify and read an entry.

    Raises:
        FormatError: not an entry, or of a kind that is not known here.
        SignatureError: not signed with this secret.
    """
    cls = _TYPES.get(key.partition("/")[0])
    if cls is None:
        raise FormatError(f"{key!r} is not a kind of entry that is known here")
    try:
        return msgspec.msgpack.decode(codec.unseal(secret, _KIND, value), type=cls)
    except codec.UNREADABLE as exc:
        raise FormatError(f"entry {key!r} cannot be read: {exc}") from exc
