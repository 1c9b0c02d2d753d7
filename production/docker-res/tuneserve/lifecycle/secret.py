"""The secret of a store: 32 random bytes in `MODEL_PATH/secret`, made once, for whoever owns the store alone to read.

It decides which feedback is held out for the test, so that nobody who sends texts can choose, and it turns addresses of
clients into pseudonyms. It stays the same over restarts, never leaves the store, and goes with it into a backup.
"""

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from tuneserve.errors import StoreError
from tuneserve.files import new_file, read_bytes

SECRET = "secret"
SECRET_BYTES = 32


def read_secret(root: Path) -> bytes:
    """The secret of the store at `root`, which is made now if there is none.

    Raises:
        StoreError: it cannot be read or made, or is no secret.
    """
    path = root / SECRET
    try:
        if not path.exists():
            _make(path)
        found = read_bytes(path, max_bytes=SECRET_BYTES)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}. It decides which feedback is held out for the test: give this user the "
            f"file, or remove it, and a new one will hold out other texts."
        ) from error
    if len(found) < SECRET_BYTES:
        raise StoreError(f"{path} is no secret of {SECRET_BYTES} bytes. Remove it, and a new one is made.")
    return found


def _make(path: Path) -> None:
    """Two processes may do this at once: the first name counts, and both read what is under it."""
    with suppress(FileExistsError), new_file(path, overwrite=False) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))


def lot(secret: bytes, key: int) -> float:
    """A number from 0 to 1 that follows from a text's key and that nobody can foretell without the secret."""
    digest = hashlib.blake2b(key.to_bytes(8, "big"), key=secret, digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") / 2**64


def pseudonym(secret: bytes, address: str, day: str) -> str:
    """Eight hexadecimal digits that name a client of one day, and another day differently."""
    return hashlib.blake2b(f"{day} {address}".encode(), key=secret, digest_size=4, person=b"client").hexdigest()
