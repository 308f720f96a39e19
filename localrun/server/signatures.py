"""Signed reasoning: proves that reasoning sent back by a client was generated here.

An HMAC over the text with a key of this installation, so it survives restarts. Reasoning with a different signature (another
server's, or altered) is omitted from the prompt: an answer without it is better than none.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import secrets
from pathlib import Path

from localrun.atomic import replacing

_PREFIX = "lr1."
_KEY_BYTES = 32


class Signer:
    """Signs and checks. Immutable; any thread."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of_folder(cls, folder: Path) -> Signer:
        """With the key in `folder`, made on the first use; where nothing can be kept, one for this run."""
        path = folder / "server-signing-key"
        with contextlib.suppress(OSError):
            key = path.read_bytes()
            if len(key) == _KEY_BYTES:
                return cls(key)
        key = secrets.token_bytes(_KEY_BYTES)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, mode=0o600) as file:
                file.write(key)
        return cls(key)

    def sign(self, text: str) -> str:
        """The signature of a thought."""
        digest = hmac.new(self._key, _normal(text), hashlib.sha256).digest()
        return _PREFIX + base64.b64encode(digest).decode()

    def is_ours(self, text: str, signature: object) -> bool:
        """Whether `signature` was made here for `text`. Leading and trailing spaces are ignored, because some clients trim them."""
        return isinstance(signature, str) and hmac.compare_digest(
            self.sign(text).encode(), signature.encode("utf-8", "replace")
        )

    def seal(self, text: str) -> str:
        """A thought with its signature, in one string (`encrypted_content`): readable, but not alterable."""
        return f"{self.sign(text)}.{base64.urlsafe_b64encode(text.encode('utf-8', 'replace')).decode()}"

    def unseal(self, sealed: object) -> str | None:
        """The thought, or None if it was not sealed here."""
        if not isinstance(sealed, str) or not sealed.startswith(_PREFIX):
            return None
        signature, _, body = sealed.removeprefix(_PREFIX).partition(".")
        try:
            text = base64.urlsafe_b64decode(body.encode("ascii", "replace")).decode()
        except ValueError:
            return None
        return text if self.is_ours(text, _PREFIX + signature) else None


def _normal(text: str) -> bytes:
    return text.strip().encode("utf-8", "replace")
