"""Images with one of their captions each, as the captioner reads them."""

import torch
from captioner import MAX_TOKENS
from torch.utils.data import Dataset, default_collate

from contrastive.data.record import BadSample, Source
from contrastive.errors import UserError
from contrastive.patches import Patches

TRIES = 10


class CaptionDataset(Dataset):
    """(pixels, ids) of a source that `contrastive.data.sources.open_source` opened.

    Args:
        preprocess: the encoder's.
        tokenizer: of the language model.
        max_tokens: longer captions are cut; eos ends each.
    """

    def __init__(self, source: Source, preprocess, tokenizer, max_tokens: int = MAX_TOKENS):
        self.source, self.preprocess, self.tokenizer, self.max_tokens = source, preprocess, tokenizer, max_tokens

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Patches, torch.Tensor]:
        """Pixels (3, H, W) or Patches, and ids (T,) int64. What cannot be read is replaced by what follows it."""
        for offset in range(TRIES):
            try:
                record = self.source[(index + offset) % len(self)]
                captions = [caption for caption in record.captions if caption.strip()]
                if captions:
                    drawn = captions[int(torch.randint(len(captions), ()))]
                    return self.preprocess(record.image), self._ids(drawn)
            except BadSample:
                continue
        raise UserError(f"{self.source.name}: {TRIES} samples in a row, from {index} on, have no image with a caption")

    def _ids(self, caption: str) -> torch.Tensor:
        ids = self.tokenizer(caption, add_special_tokens=False)["input_ids"][: self.max_tokens - 1]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])


def collate(samples: list[tuple[torch.Tensor | Patches, torch.Tensor]]) -> dict[str, torch.Tensor | Patches]:
    """A batch: pixels (B, 3, H, W) or Patches, ids (B, T) padded with zeros on the right, mask (B, T)."""
    ids = torch.nn.utils.rnn.pad_sequence([ids for _, ids in samples], batch_first=True)
    lengths = torch.tensor([len(ids) for _, ids in samples])
    return {
        "pixels": default_collate([pixels for pixels, _ in samples]),
        "ids": ids,
        "mask": torch.arange(ids.shape[1]) < lengths[:, None],
    }
