"""Labelled images as image-text pairs: templates filled with the class name."""

import hashlib
from dataclasses import replace

from contrastive.data.prompts import fill
from contrastive.data.record import BadSample, Record, Source


class ClassPrompts:
    """A labelled source whose captions are every template filled with the sample's class name.

    Args:
        source: has `class_names`.
        templates: each with '{}' for the name.

    A sample without a label has no caption.
    """

    def __init__(self, source: Source, templates: tuple[str, ...]):
        self.source = source
        self.templates = templates
        self.name = source.name
        self.class_names = source.class_names
        # What the order and the downloads know of shards holds for their samples under any caption.
        self.shard_sizes = getattr(source, "shard_sizes", None)
        self.remote = getattr(source, "remote", False)
        self.prefetch = getattr(source, "prefetch", None)
        self.wanted = getattr(source, "wanted", None)
        self._filled = tuple(fill(templates, name) for name in source.class_names)
        identity = "\n".join((source.fingerprint, *templates))
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def heldout_labels(self) -> frozenset[int] | None:
        """The classes that training never sees, where the labelled source tells them apart."""
        return getattr(self.source, "heldout_labels", None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        captions = self._captions(record.label, record.key)
        group = self.class_names[record.label] if captions else None
        return replace(record, captions=captions, caption_weights=None, caption_group=group)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self.source.label(index))

    def label(self, index: int) -> int | None:
        return self.source.label(index)

    def _captions(self, label: int | None, key: str = "") -> tuple[str, ...]:
        if label is None:
            return ()
        if not 0 <= label < len(self._filled):
            raise BadSample("bad_label", key)
        return self._filled[label]
