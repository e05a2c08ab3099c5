"""What is asked of a caption, and its identity."""

import hashlib

# Real captions end far below this; longer ones are documents that cost tokenizing time and teach nothing.
MAX_CAPTION_CHARS = 20_000


def caption_fault(text: str) -> str | None:
    """Return None, or why not to use it: 'empty_caption', 'caption_too_long' or 'bad_utf8'."""
    if len(text) > MAX_CAPTION_CHARS:
        return "caption_too_long"
    if not text or text.isspace():
        return "empty_caption"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: what Python makes of bytes that were not text
        return "bad_utf8"
    return None


def caption_id(text: str) -> int:
    """Return a signed 64-bit hash of the text: equal captions have equal ids, on every machine and run."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
