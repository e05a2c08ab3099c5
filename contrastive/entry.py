"""From the shell to a command: which there are, which is meant, and how it ends.

Nothing heavy is imported before the command is known: `contrastive --help` answers at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from contrastive.errors import UserError, did_you_mean
from contrastive.words import called_here

COMMANDS = {
    "pretrain": "train a CLIP or SigLIP model on image-text pairs",
    "finetune": "fine-tune a pretrained image tower on labelled images",
    "classifier": "train a plain ViT classifier from scratch",
    "zero-shot": "score a model on labelled images it was not trained on",
    "evaluate": "retrieval, probes, segmentation, ...: a table of models and tasks",
    "embed": "write embeddings of images and captions to files",
    "search": "the images nearest to a text or to another image",
    "curate": "choose which pairs of a data set to train on",
    "caption": "write captions of images",
    "export": "write a model for transformers, open_clip, timm or ONNX",
    "visualize": "pictures of what a model sees",
    "demo": "a page to try models in: labels, words on patches, search",
    "inspect": "look at data before training on it",
    "index": "index WebDataset shards",
    "shard": "write any data as WebDataset shards",
    "plan": "memory, speed and hours of a run, before it is paid for",
    "checkpoint": "list, verify, prune or average the checkpoints of a run",
    "completion": "what makes a shell complete all of this",
}
"""Names, and what each is for; `zero-shot` is `main` of commands/zero_shot_command.py."""


def main() -> None:
    """`contrastive NAME ...`, the installed command and `python -m contrastive`."""
    _, *words = sys.argv
    name = words[0].replace("_", "-") if words else ""
    if name in COMMANDS:
        run(name, words[1:])
    else:
        run_script("contrastive", _other_words, words)


def run(name: str, words: list[str] | None = None) -> None:
    """Run the command called `name` with `words`, by default those of the command line."""
    by_script = sys.argv[0].endswith(".py") and words is None
    prog = Path(sys.argv[0]).name if by_script else f"contrastive {name}"
    run_script(prog, lambda args: import_module(home_of(name)).main(args), words)


def home_of(name: str) -> str:
    """Return the module of a command."""
    return f"contrastive.commands.{name.replace('-', '_')}_command"


def run_script(prog: str, main: Callable[[list[str]], None], words: list[str] | None = None) -> None:
    """Run `main(words)`; what the user or the machine did wrong becomes one line and exit status 2.

    Before the processes have met, all fail alike and only the first one speaks; after that each may fail alone.
    """
    try:
        with _ctrl_c():
            main(sys.argv[1:] if words is None else words)
    except BrokenPipeError:  # whoever read has seen enough: `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so once more as it ends
        sys.exit(141)
    except (UserError, OSError) as error:
        distributed = sys.modules.get("torch.distributed")
        met = distributed is not None and distributed.is_available() and distributed.is_initialized()
        if os.environ.get("RANK", "0") == "0" or met:
            where = f" [rank {os.environ['RANK']}]" if met else ""
            print(f"{prog}: error:{where} {error}", file=sys.stderr)
        else:
            time.sleep(2)  # a launcher ends the others when one has failed: the first has to speak before that
        sys.exit(2)
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        print(f"{prog}: error: [rank {os.environ['RANK']}] ended, because another rank is gone", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        exec("")  # Python remembers one inside an `exec`, such as dataclasses', and would end by the signal instead
        sys.exit(130)


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Meanwhile whatever comes of a Ctrl-C is a KeyboardInterrupt, and a further one is too late to be told.

    Libraries whose import is interrupted say something else at times: that a part of themselves is missing, say.
    """
    usual = after = signal.default_int_handler
    if signal.getsignal(signal.SIGINT) is not usual or threading.current_thread() is not threading.main_thread():
        yield  # a process in the background ignores it, a program of one's own may handle it
        return
    noted = []

    def note(number, frame) -> None:
        noted.append(number)
        usual(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except SystemExit:
        raise
    except BaseException:
        if not noted:
            raise
        after = signal.SIG_IGN  # while Python takes torch apart
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, after)


def _other_words(words: list[str]) -> None:
    """What stands where a command should."""
    name = words[0] if words else ""
    if name in ("", "-h", "--help", "help"):
        print(_help())
        sys.exit(0 if name else 2)
    if name in ("-V", "--version", "version"):
        import contrastive

        print(f"contrastive {contrastive.__version__}")
        return
    if name.startswith("-"):
        raise UserError(f"the command comes first, then its flags: contrastive pretrain {name} ...; see --help")
    if here := called_here("command", name.replace("-", "_")):
        raise UserError(f"unknown command '{name}'{here}")
    raise UserError(f"unknown command '{name}'.{did_you_mean(name, COMMANDS)} There are {', '.join(COMMANDS)}")


def _help() -> str:
    lines = [f"  {name:<11} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        (
            "usage: contrastive COMMAND ...      contrastive COMMAND --help",
            "",
            "  contrastive pretrain --loss sigmoid",
            "  contrastive zero-shot runs/quickstart-sigmoid --data scenes:test",
            "  accelerate launch -m contrastive pretrain --config cc3m --data 'pairs/*.tar'",
            "",
            *lines,
        )
    )
