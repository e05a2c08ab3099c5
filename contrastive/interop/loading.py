"""`contrastive.load`: a model out of any folder that we can read, or out of a repository of the Hugging Face hub.

Nothing is read but JSON, safetensors and vocabularies.
"""

import errno
import fnmatch
import functools
import importlib
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from contrastive.errors import UserError, did_you_mean, reason_of
from contrastive.interop.bundle import Bundle, load_native, native_folder
from contrastive.models import model_config

# The modules formats/NAME_folder.py are asked in this order: a folder can hold the files of several libraries, and then
# the first says the most about the model.
FOREIGN = ("open_clip", "timm", "transformers")
PREFIX = "hf-hub:"
# What a model folder of a library that we read needs, or one of ours. What could run code when read (pickles, Python),
# checkpoints, data and the weights of other models never reach the disk.
WEIGHTS = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "ema.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
]
TOKENIZER = ["tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"]
READ = [
    "config.json",
    "manifest.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.safetensors.index.json",
    *WEIGHTS,
    *TOKENIZER,
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    *[f"tokenizer/*.{suffix}" for suffix in ("json", "txt", "model")],
]
# Many repositories of open_clip hold the weights a second time for transformers; open_clip's are read first.
OPEN_CLIP = {"open_clip_config.json", "open_clip_model.safetensors"}
SECOND_WEIGHTS = "model*.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load a model with its preprocessing and tokenizer.

    Args:
        path: a run folder (its final model is taken, else its newest whole checkpoint), one of its checkpoints, or a
            model folder: ours, or of transformers, open_clip or timm; or hf-hub:ORG/NAME@REVISION, of which only
            JSON, safetensors and vocabularies are fetched. Without a REVISION, the commit it came to is printed.

    Returns:
        The model in float32 and eval mode on `device`. A part whose files the folder lacks is `Absent`: the model
        loads, and any use of the part says what is missing.

    Raises:
        UserError: no model there, an architecture that is not ours, a damaged file, weights that do not fit, or no such
            device.
    """
    device = usable(device)
    bundle = read(path)
    bundle.model.eval().to(device)
    return bundle


def usable(device: str | torch.device) -> torch.device:
    """Return the device; UserError, with those that are here, where torch cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError):
        kind = torch.accelerator.current_accelerator()
        here = [f"{kind.type}:{n}" for n in range(torch.accelerator.device_count())] if kind else []
        raise UserError(f"device '{device}' is not here; there is {', '.join(['cpu', *here])}") from None


def read(path: str | Path, with_tokenizer: bool = True) -> Bundle:
    """As `load`, on the CPU. Without the tokenizer (it is `Absent` then) no model code of transformers is imported."""
    if is_hub_name(path):
        folder, pinned = fetch(str(path))
        return replace(read(folder, with_tokenizer), path=Path(pinned))
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"no model at {path}: no such file or folder{_what_is_meant(path, folder)}")
    lone_weights = folder.suffix == ".safetensors" and not any(folder.parent.glob("*config.json"))
    if folder.is_file() and not lone_weights:  # timm's reader says what a file of weights alone lacks
        raise UserError(f"no model at {path}: that is a file; give its folder, {folder.parent}")
    own = native_folder(folder)
    if own is not None:
        return load_native(own, with_tokenizer)
    for name in FOREIGN:
        library = importlib.import_module(f"contrastive.interop.formats.{name}_folder")
        if library.recognises(folder):
            return library.load(folder, with_tokenizer)
    if any(folder.glob("*.onnx")):
        raise UserError(f"{folder} holds ONNX graphs, which are for onnxruntime alone: load what they were made from")
    raise UserError(
        f"no model at {folder}: neither a run (final/ or checkpoints/) nor a model folder of ours, transformers, "
        "open_clip or timm (config.json or open_clip_config.json beside safetensors)"
    )


def _what_is_meant(path: str | Path, folder: Path) -> str:
    """A hint at what a path that is not there was meant to be; empty without an idea."""
    on_hub = f". For the hub: hf-hub:{path}" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
    with suppress(UserError):
        model_config(str(path))
        made = f"contrastive.create_model('{path}') makes it, with random weights"
        return on_hub or f". That is an architecture: {made}; with weights: hf-hub:ORGANISATION/NAME"
    if folder.parent.is_dir():
        hint = did_you_mean(folder.name, (other.name for other in folder.parent.iterdir()))
        return f".{hint}" if hint else ""
    return on_hub


def is_hub_name(path: str | Path) -> bool:
    """Whether it is hf-hub:ORG/NAME rather than a path."""
    return str(path).startswith(PREFIX)


def results_folder(path: Path) -> Path:
    """Where results of a model go that are not told where: its own folder; for a hub's, one under evaluations/."""
    if not is_hub_name(path):
        return path
    return Path("evaluations") / str(path).removeprefix(PREFIX).replace("/", "-")


@functools.cache  # one command may load a model several times: asked, and told, once
def fetch(name: str) -> tuple[Path, str]:
    """Return the local folder of hf-hub:ORG/NAME[@REVISION], downloaded where it is not, and the name with its commit.

    A full commit hash that is in the cache needs no network; without a network the cached state of a branch is taken.

    Raises:
        UserError: no such repository or revision, no access, no safetensors, or no network and nothing cached.
    """
    repo, revision = _parts(name)
    folder = _cached(repo, revision) if _COMMIT.fullmatch(revision) else None
    if folder is None:
        folder = _download(name, repo, revision)
    pinned = f"{PREFIX}{repo}@{folder.name}"
    if pinned != name:
        from contrastive.log import say  # draws with rich, which a model on this disk does without

        say(f"{name} is {pinned}, which will always be these weights")
    return folder, pinned


def _parts(name: str) -> tuple[str, str]:
    repo, _, revision = str(name).removeprefix(PREFIX).partition("@")
    check_repo(repo, name)
    return repo, revision or "main"


def check_repo(repo: str, where: str) -> None:
    """Raise UserError where it cannot be the name of a repository of the hub; `where` it stands begins the message."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{where}: a repository of the hub is ORG/NAME, as {PREFIX}ORG/NAME@REVISION")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{where}: the hub has no such names: {reason_of(error)}") from None


def _download(name: str, repo: str, revision: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = {file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()}
        if not any(fnmatch.fnmatch(file, pattern) for file in files for pattern in WEIGHTS):
            pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
            only = f", only a pickle ({pickles[0]}), which can run any code when read" if pickles else ""
            raise UserError(f"{name} has no model.safetensors{only}: ask its owner for that file")
        ignored = [SECOND_WEIGHTS] if files >= OPEN_CLIP else []
        return Path(snapshot_download(repo, revision=revision, allow_patterns=READ, ignore_patterns=ignored))
    except UserError:
        raise
    except RevisionNotFoundError:
        why = f"{repo} has no branch, tag or commit '{revision}'"
    except GatedRepoError:
        why = "access has to be asked for on its page, then `hf auth login`"
    except RepositoryNotFoundError:
        why = "no such model on the hub, or a private one: mend the name, or `hf auth login`"
    except Exception as error:  # no network: another class for every client and reason
        folder, reason = _cached(repo, revision), reason_of(error)
        if folder is not None:
            return folder
        if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
            why = (
                f"cannot write to the cache ({reason}): make room or mend its rights, or set HF_HOME to another folder"
            )
        else:
            why = f"the hub cannot be reached, and the cache does not have it ({reason}): fetch it where there is a "
            why += "network (hf download), and give the folder"
    raise UserError(f"{name}: {why}")


def _cached(repo: str, revision: str) -> Path | None:
    """The folder in the cache, where it is whole."""
    from huggingface_hub import snapshot_download

    for ignored in ([], [SECOND_WEIGHTS]):
        kept = {"allow_patterns": READ, "ignore_patterns": ignored, "local_files_only": True}
        try:
            folder = Path(snapshot_download(repo, revision=revision, **kept))
        except OSError:  # not there, or not all of it
            continue
        if SECOND_WEIGHTS not in ignored or all((folder / file).exists() for file in OPEN_CLIP):
            return folder
    return None
