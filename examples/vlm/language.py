"""The language model: a small one from scratch with a vocabulary of the captions, or any folder of transformers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from contrastive.errors import UserError

EOS, BOS, PAD = "<eos>", "<bos>", "<pad>"


def small_language(captions: Iterable[str], vocab_size: int = 2048) -> tuple[nn.Module, object]:
    """Build a Llama of half a million parameters with random weights, and a byte-level BPE trained on the captions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it is written in no time
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(captions, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, bos_token=BOS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def load_language(folder: Path, trained: bool) -> tuple[nn.Module, object]:
    """Read a causal language model and its tokenizer from a folder of transformers.

    Args:
        trained: in float32 whatever the files hold, for half precision alone does not train
            (`--mixed_precision bf16` is for speed); otherwise in their own precision.

    Raises:
        UserError: no model there, one that is not causal, or a tokenizer that is absent or not the model's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        raise UserError(f"no language model at {folder}: config.json is missing; give a folder that transformers saved")
    try:
        dtype = torch.float32 if trained else "auto"
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the language model {folder}: {str(error).splitlines()[0]}") from None
    if not tokenizer("a caption")["input_ids"]:
        raise UserError(f"{folder} has no tokenizer: copy its tokenizer.json from where the model came from")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {rows}: it is another model's"
        )
    if not _is_causal(model.eval()):
        raise UserError(f"{folder} is not a causal language model: its first token sees the ones behind it")
    return model, tokenizer


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether what comes later changes nothing before it; transformers loads BERT as a causal model too."""
    one, other = (model(input_ids=torch.tensor([[1, 2, last]])).logits[0, 0] for last in (3, 4))
    return torch.equal(one, other)
