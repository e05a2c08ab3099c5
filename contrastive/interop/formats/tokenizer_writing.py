"""Our tokenizers as files that `AutoTokenizer` loads: tokenizer.json, tokenizer_config.json, CLIP's vocabulary.

What transformers has to be told, because its own defaults would give a model other ids than it was trained on:

padding, truncation   saved as defaults, which its processors take over; a bare tokenizer pads only when it is asked
model_input_names     ids alone: an attention mask would hide the padding that the towers have always seen
split_special_tokens  '<eos>' or '!' (CLIP's padding) in a text is text
"""

import copy
import json
from pathlib import Path

from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as Core

from contrastive.data.captions import Cleaning
from contrastive.data.tokenizer import CLIP_BOS, CLIP_EOS, BpeTokenizer, Tokenizer, TransformersTokenizer
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.tokenizer_reading import CLEANINGS

MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
CLIP_NAMES = {CLIP_BOS: "<|startoftext|>", CLIP_EOS: "<|endoftext|>"}
GENERIC = "PreTrainedTokenizerFast"
ASCII_PUNCTUATION = r"[!-/:-@\[-^`{-~]"  # all but '_'

CLEANING_NOTE = (
    "the exported tokenizer does not mend encoding slips and HTML entities as ours does (ftfy, html.unescape): texts "
    "of printable ASCII without '&' have the same ids"
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Write the tokenizer into an existing folder, for `AutoTokenizer.from_pretrained`.

    With padding="max_length" and truncation=True, which the files name as defaults, it gives our ids.

    Returns:
        What the files cannot do as ours does, in plain sentences.
    """
    if isinstance(tokenizer, TransformersTokenizer):
        return _write_transformers(tokenizer, folder)
    assert isinstance(tokenizer, BpeTokenizer)
    is_clip = tokenizer.kind == "clip"
    core = _with_names(tokenizer.core) if is_clip else Core.from_str(tokenizer.core.to_str())
    bos, eos, pad = (core.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    core.normalizer = _normalizer(tokenizer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_id), (eos, tokenizer.eos_id)]
    )
    pad_and_cut(core, tokenizer)
    core.save(str(folder / MODEL_FILE))
    # CLIPTokenizer makes its own normalizer, which cannot drop punctuation.
    own_class = is_clip and tokenizer.clean != "canonicalize"
    if own_class:
        core.model.save(str(folder))  # vocab.json and merges.txt
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    if is_clip:
        names["unk_token"] = eos
    config = {"tokenizer_class": "CLIPTokenizer" if own_class else GENERIC, **names, "split_special_tokens": True}
    write_json(folder / CONFIG_FILE, config | _defaults(tokenizer))
    return [CLEANING_NOTE] if is_clip or tokenizer.clean != "none" else []


def pad_and_cut(core: Core, tokenizer: Tokenizer) -> None:
    """Make a tokenizer of the tokenizers library pad and cut to our context length by itself."""
    core.enable_truncation(tokenizer.context_length)
    pad = core.id_to_token(tokenizer.pad_id)
    core.enable_padding(pad_id=tokenizer.pad_id, pad_token=pad, length=tokenizer.context_length)


def write_open_clip_tokenizer(tokenizer: Tokenizer | Absent, folder: Path) -> tuple[dict, list[str]]:
    """Write the tokenizer's files, where it needs some; return entries of text_cfg and notes for the user."""
    named = {"hf_tokenizer_name": "local"}  # of a local-dir open_clip reads the folder, whatever the name
    if isinstance(tokenizer, Absent):
        return named, [
            "the model came without a tokenizer: open_clip looks for its files (tokenizer.json, ...) in the folder"
        ]
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.kind == "clip":
        clean = {"clean": "canonicalize"} if tokenizer.clean == "canonicalize" else {}
        return ({"tokenizer_kwargs": clean} if clean else {}), []
    clean = next((theirs for theirs, ours in CLEANINGS.items() if ours == tokenizer.clean), "whitespace")
    notes = []
    if tokenizer.clean == "none":
        notes.append(
            "open_clip mends encoding slips and HTML entities and squeezes white space before any tokenizer, which "
            "ours did not: texts without these have the same ids"
        )
    # open_clip cleans by itself, exactly as we do, so the files need not.
    plain = copy.copy(tokenizer)
    plain.clean = "none"
    return {**named, "tokenizer_kwargs": {"clean": clean}}, notes + write_tokenizer(plain, folder)


def _defaults(tokenizer: Tokenizer) -> dict:
    return {
        "model_max_length": tokenizer.context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "padding": "max_length",
        "truncation": True,
        "max_length": tokenizer.context_length,
        "model_input_names": ["input_ids"],
        "clean_up_tokenization_spaces": False,
    }


def _with_names(core: Core) -> Core:
    """Return CLIP's vocabulary with its two special tokens called as OpenAI and transformers call them."""
    description = json.loads(core.to_str())
    for token in description["added_tokens"]:
        token["content"] = CLIP_NAMES[token["content"]]
    model = description["model"]
    model["vocab"] = {CLIP_NAMES.get(word, word): index for word, index in model["vocab"].items()}
    return Core.from_str(json.dumps(description))


def _normalizer(tokenizer: BpeTokenizer) -> normalizers.Normalizer:
    """What is done to a text before its words are looked up: cleaning, then what the vocabulary itself asks for."""
    cleaning: Cleaning = "clip" if tokenizer.kind == "clip" and tokenizer.clean == "none" else tokenizer.clean
    steps = [tokenizer.core.normalizer] if tokenizer.core.normalizer is not None else []
    if cleaning == "none":
        return normalizers.Sequence(steps)
    cleaned = [
        normalizers.NFC(),
        normalizers.Replace(Regex("[\u2018-\u201b]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
        normalizers.Lowercase(),
    ]
    if cleaning == "canonicalize":
        cleaned += [normalizers.Replace("_", " "), normalizers.Replace(Regex(ASCII_PUNCTUATION), "")]
    return normalizers.Sequence([*cleaned, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), *steps])


def _write_transformers(tokenizer: TransformersTokenizer, folder: Path) -> list[str]:
    """Save the library's own tokenizer, with our length and padding as its defaults."""
    tokenizer.core.save_pretrained(str(folder))
    config = read_json(folder / CONFIG_FILE)
    write_json(folder / CONFIG_FILE, config | _defaults(tokenizer))
    notes = []
    if tokenizer.clean != "none":
        notes.append(
            f"the exported tokenizer does not clean texts ('{tokenizer.clean}'), which ours did: do that before it"
        )
    if tokenizer.add_eos and not tokenizer.ends_with_eos:
        notes.append("the exported tokenizer does not end a text with its eos token, which ours did: add it to texts")
    return notes
