"""Labelled images as image-text pairs: templates filled with the class name."""

import hashlib
from dataclasses import replace

from contrastive.data.prompts import fill
from contrastive.data.record import BadSample, Record, Source, Wrapped


class ClassPrompts(Wrapped):
    """A labelled source whose captions are every template filled with the sample's class name.

    Args:
        source: has `class_names`.
        templates: each with '{}' for the name.

    A sample without a label has no caption.
    """

    def __init__(self, source: Source, templates: tuple[str, ...]):
        super().__init__(source)
        self.templates, self.prompted, self.captioned = templates, True, True
        self._filled = tuple(fill(templates, name) for name in source.class_names)
        identity = "\n".join((source.fingerprint, *templates))
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def stored(self) -> Source:
        return self.source.stored

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        captions = self._captions(record.label, record.key)
        group = self.class_names[record.label] if captions else None
        return replace(record, captions=captions, caption_weights=None, caption_group=group)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self.source.label(index))

    def _captions(self, label: int | None, key: str = "") -> tuple[str, ...]:
        if label is None:
            return ()
        if not 0 <= label < len(self._filled):
            raise BadSample("bad_label", key)
        return self._filled[label]
