"""A vision-language model in one page: patch tokens, a projector, a causal language model (LLaVA, Liu et al. 2023).

    [bos] [patch 1] ... [patch N] [word 1] ... [word T] [eos]

The encoder is frozen; the projector maps its patch tokens to where the language model's word embeddings live.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from language import load_language
from safetensors.torch import load_file, save_file
from torch import nn

import contrastive
from contrastive.errors import UserError
from contrastive.files import write_json
from contrastive.interop.bundle import weights_key
from contrastive.patches import Patches

IGNORED = -100  # the label that transformers' loss leaves out
MAX_TOKENS = 40  # of a caption, its end included


class Captioner(nn.Module):
    """Image in, caption out.

    Args:
        encoder: `contrastive.load_image_encoder(...)`.
        language_model: any causal language model of transformers.
        tokenizer: its tokenizer; it needs an eos token.
    """

    def __init__(self, encoder: nn.Module, language_model: nn.Module, tokenizer):
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise UserError("the language model's tokenizer has no eos token: captions would have no end")
        native = encoder.architecture.native
        self.num_patches = encoder.preprocess.config.most_patches if native else encoder.num_patches  # at most
        needed = 1 + self.num_patches + MAX_TOKENS
        most = getattr(language_model.config, "max_position_embeddings", needed)
        if needed > most:
            raise UserError(
                f"{self.num_patches} patches and {MAX_TOKENS} tokens are more than the {most} positions of the "
                "language model; take an encoder of larger patches or smaller images"
            )
        self.encoder = encoder.requires_grad_(False)
        self.language_model, self.tokenizer = language_model, tokenizer
        hidden = language_model.get_input_embeddings().embedding_dim
        # The norm first: without the encoder's own, patch tokens can be of any scale.
        norm = nn.LayerNorm(encoder.hidden_size)
        self.projector = nn.Sequential(
            norm, nn.Linear(encoder.hidden_size, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def train(self, mode: bool = True) -> "Captioner":
        """Train the projector and, unless it is frozen, the language model; what is frozen stays without dropout."""
        super().train(mode)
        for part in (self.encoder, self.language_model):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def prefix(self, pixels: torch.Tensor | Patches) -> tuple[torch.Tensor, torch.Tensor]:
        """What the caption follows: (B, 3, H, W) to (B, 1 + N, hidden), without the 1 where there is no bos.

        And which of it is real, bool: native images of fewer patches than others have padding, on the left.
        """
        with torch.no_grad():
            patches = self.encoder(pixels)  # (B, N, D)
        prefix = self.projector(patches.to(self.projector[0].weight.dtype))
        real = pixels.cut().mask if isinstance(pixels, Patches) else patches.new_ones(patches.shape[:2]).bool()
        if self.tokenizer.bos_token_id is not None:
            bos = torch.full((len(patches), 1), self.tokenizer.bos_token_id, device=patches.device)
            prefix = torch.cat([self.language_model.get_input_embeddings()(bos), prefix], dim=1)
            real = F.pad(real, (1, 0), value=True)
        order = real.int().argsort(dim=1, stable=True)
        return prefix.gather(1, order[..., None].expand_as(prefix)), real.gather(1, order)

    def forward(self, pixels: torch.Tensor | Patches, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of the captions' tokens, a scalar.

        Args:
            pixels: (B, 3, H, W), preprocessed, or Patches.
            ids: (B, T) int64, each caption ended by eos, padded on the right with anything.
            mask: (B, T) bool, false on padding.
        """
        prefix, real = self.prefix(pixels)
        words = self.language_model.get_input_embeddings()(ids)
        labels = torch.cat([ids.new_full(prefix.shape[:2], IGNORED), ids.masked_fill(~mask, IGNORED)], dim=1)
        seen = torch.cat([real, mask], dim=1).long()
        embeddings = torch.cat([prefix.to(words.dtype), words], dim=1)
        # Padding before the text is none of its positions; generate counts so by itself.
        places = {"position_ids": (seen.cumsum(dim=1) - 1).clamp(min=0)} if isinstance(pixels, Patches) else {}
        return self.language_model(inputs_embeds=embeddings, attention_mask=seen, labels=labels, **places).loss

    @torch.no_grad()
    def caption(self, pixels: torch.Tensor | Patches, max_tokens: int = MAX_TOKENS) -> list[str]:
        """Caption images (B, 3, H, W), or Patches, greedily."""
        prefix, real = self.prefix(pixels)
        ids = self.language_model.generate(
            inputs_embeds=prefix.to(self.language_model.dtype),
            attention_mask=real.long(),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def save(self, folder: Path, encoder_path: str, layer: int) -> None:
        """Write all but the encoder, which is named by its path and the hash of its weights; `load` reads it back."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.projector.state_dict(), folder / "projector.safetensors")
        self.language_model.save_pretrained(folder / "language_model")
        self.tokenizer.save_pretrained(folder / "language_model")
        place = str(Path(encoder_path).resolve()) if Path(encoder_path).exists() else encoder_path  # or a hub's name
        made = {"encoder": place, "layer": layer, "encoder_sha256": weights_key(self.encoder)}
        write_json(folder / "captioner.json", made)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Captioner":
        """Read what `save` wrote, in eval mode."""
        file = folder / "captioner.json"
        try:
            made = json.loads(file.read_text())
            path, layer, key = made["encoder"], made["layer"], made["encoder_sha256"]
        except OSError:
            raise UserError(f"no captioner at {folder}: no captioner.json; give the --out of train.py") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is damaged; train again") from None
        encoder = contrastive.load_image_encoder(path, layer=layer)
        if weights_key(encoder) != key:
            raise UserError(f"{path} holds other weights than the captioner was trained on; train again")
        model = cls(encoder, *load_language(folder / "language_model", trained=False))
        model.projector.load_state_dict(load_file(folder / "projector.safetensors"))
        return model.eval().to(device)
