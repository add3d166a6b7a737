"""Passwords in addresses (``http://user:password@host``) stay in memory: what is written or shown has ``***`` in their place."""

from __future__ import annotations

import re

HIDDEN = "***"
_SECRET = re.compile(
    r"(?<=://)(?:[^\s/:'\"]*:[^\s'\"]*|[^\s/'\"]+)(?=@)"  # user:password (which may hold / and @), or a token alone
    r"|(?<=[?&]password=)[^\s&'\"]+"
)


def redacted(text: str) -> str:
    """``text`` with the credentials of every address in it hidden: ``http://***@host``."""
    return _SECRET.sub(HIDDEN, text)
