"""Models from the Hugging Face hub and to it. Nothing is read but JSON, safetensors and vocabularies."""

import errno
import fnmatch
import functools
import re
from pathlib import Path

from contrastive.errors import UserError, reason_of

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


def push(folder: Path, named: Path, repo: str, private: bool) -> str:
    """Upload a folder to ORG/NAME, which is made where it does not exist; return the address of the commit.

    Args:
        named: what the folder is called in messages.

    Raises:
        UserError: no right to write there, or no network; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Exported by contrastive"))
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            reason = "the token may not write there: log in with `hf auth login`, or set HF_TOKEN to one that may"
        else:
            reason = reason_of(error)
    except Exception as error:  # no network: another class for every client and reason
        reason = reason_of(error)
    raise UserError(f"{named} is written, but not pushed to {repo}: {reason}; then: hf upload {repo} {named}")


def check_push(repo: str) -> None:
    """Raise UserError where `push` to `repo` cannot work, before any work is done."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    _check_repo(repo, f"--push {repo}")
    if is_offline_mode():
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise UserError(f"--push {repo}: not logged in to the hub; use `hf auth login`, or set HF_TOKEN")


def _parts(name: str) -> tuple[str, str]:
    repo, _, revision = str(name).removeprefix(PREFIX).partition("@")
    _check_repo(repo, name)
    return repo, revision or "main"


def _check_repo(repo: str, where: str) -> None:
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
