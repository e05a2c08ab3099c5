"""Checkpoints: everything a run needs to continue exactly, in a folder that is whole or absent.

    model.safetensors, config.json, ...          a model folder, as interop.bundle writes it
    ema.safetensors                              averaged weights, where the run keeps them
    objectives/                                  modules that only serve training: model.safetensors, ema.safetensors
    optimizer.safetensors                        NUMBER/PARAMETER/STATE for each optimizer in turn
    optimizer/shard-*.safetensors                or that, each rank's part, where FSDP shards it
    state.json                                   the data cursor, step included; bad samples of the last steps
    manifest.json                                sha256 of every file

Learning rate, data order and random numbers are functions of the step, so they are not stored.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
from rich.filesize import decimal
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from contrastive.distributed.collectives import rank, together, world_size
from contrastive.distributed.sharding import like, whole_tensors
from contrastive.errors import UserError, reason_of
from contrastive.files import read_json, write_folder
from contrastive.interop.bundle import fill_model, newest_whole, tensors_in
from contrastive.log import warn
from contrastive.objectives.learner import PREFIX
from contrastive.optim import ExponentialMovingAverage

Optimizers = list[torch.optim.Optimizer]
Tensors = Mapping[str, torch.Tensor]
SaveModel = Callable[[Path, Tensors, Tensors | None], None]


class TrainingState(TypedDict):
    """What of a run at one step a checkpoint holds."""

    weights: Tensors
    average: Tensors | None
    optimizer: Tensors
    cursor: dict


def training_state(
    model: nn.Module, optimizers: Optimizers, ema: ExponentialMovingAverage | None, cursor: dict
) -> TrainingState:
    """Return a run's state as it is, sharing its memory; all ranks call where it is sharded.

    The first rank then gets the weights whole and as copies; of the optimizers' state each has its part.
    """
    is_first = rank() == 0
    weights = dict(whole_tensors(model.state_dict(), keep=is_first))
    average = None
    if ema is not None:
        average = dict(whole_tensors(ema.average, keep=is_first))
        # What does not learn is its own average.
        fixed = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
        average |= {name: weights[name] for name in fixed if is_first}
    return {
        "weights": weights,
        "average": average,
        "optimizer": _optimizer_tensors(model, optimizers),
        "cursor": cursor,
    }


def write_checkpoint(
    folder: Path, state: TrainingState, save_model: SaveModel, group: dist.ProcessGroup | None, size: int
) -> None:
    """Write `folder` whole or not at all, from the first rank; where the state is sharded all call.

    Args:
        save_model: writes the model folder, given the folder, the weights and the averaged ones or None.
        group: over which the ranks meet where the state is sharded, else None. size: bytes that it takes.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    import torch.distributed.checkpoint as dcp  # half a second, which neither --help nor a bad flag waits for

    shards = folder.parent / ".tmp-optimizer"

    def begin() -> None:
        check_room(folder.parent, size, f"checkpoint {folder.name}", "make room and continue with --resume")
        if group is not None:
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir(parents=True)

    def fill(temporary: Path) -> None:
        save_model(temporary, state["weights"], state["average"])
        if group is not None:
            shards.rename(temporary / "optimizer")
        else:
            whole = {name: tensor.cpu().contiguous() for name, tensor in state["optimizer"].items()}
            save_file(whole, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state["cursor"], indent=1))

    try:
        if group is None:
            begin()
        else:
            together(lambda: begin() if rank() == 0 else None, group)
            writer = dcp.HuggingFaceStorageWriter(str(shards), save_distributed=True)
            dcp.save(state["optimizer"], storage_writer=writer, process_group=group)
        if rank() == 0:
            write_folder(folder, fill)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
        raise UserError(
            f"cannot save {folder}: {getattr(cause, 'strerror', None) or reason_of(cause)}; earlier checkpoints are "
            "intact, make room and continue with --resume"
        ) from error


def check_room(folder: Path, needed: int, what: str, mend: str) -> None:
    """Raise UserError where the disk of `folder` has less than `needed` bytes free.

    what: is to be written, mend: what to do about it; for the message.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(f"{folder} has {decimal(free)} free, and {what} needs {decimal(needed)}; {mend}")


def find_checkpoint(checkpoints: Path) -> Path:
    """Return the newest checkpoint that verifies, and say which were passed over.

    Raises:
        UserError: none is whole; a run is never silently started afresh.
    """
    folder, passed = newest_whole(checkpoints)
    for line in passed:
        warn(f"checkpoint passed over: {line}")
    if folder is None:
        why = "all are damaged: " + "; ".join(passed) if passed else "there is none yet"
        raise UserError(f"cannot resume from {checkpoints}: {why}. Start again with another --out")
    return folder


def read_cursor(folder: Path) -> dict:
    """Return where in the data the checkpoint stands."""
    cursor = read_json(folder / "state.json")
    if type(cursor.get("step")) is not int:
        raise UserError(f"{folder / 'state.json'} names no step: it is damaged, or of something else")
    return cursor


def load_model(folder: Path, model: nn.Module) -> None:
    """Fill the model, not sharded yet, from a verified checkpoint; UserError where it is another."""
    fill_model(model, saved_weights(folder), folder / "model.safetensors")


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a checkpoint by parameter name, those of objectives with the model's."""
    return tensors_in(folder / "model.safetensors") | _beside(folder / "objectives/model.safetensors")


def reload_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put a verified checkpoint's weights into a model, sharded or not, that may be compiled and wrapped."""
    saved, own = saved_weights(checkpoint), model.state_dict()
    model.load_state_dict({name: like(saved[name].to(tensor.device), tensor) for name, tensor in own.items()})


def load_training_state(
    folder: Path, model: nn.Module, optimizers: Optimizers, ema: ExponentialMovingAverage | None
) -> None:
    """Fill optimizers and average in place from a verified checkpoint, by however many ranks it was written.

    Raises:
        UserError: they differ from what the run was started with.
    """
    if ema is not None:
        if not (folder / "ema.safetensors").exists():
            raise UserError(f"{folder} has no averaged weights; resume with the train.ema_decay it was started with")
        saved = tensors_in(folder / "ema.safetensors") | _beside(folder / "objectives/ema.safetensors")
        shapes = {name: tensor.shape for name, tensor in ema.average.items()}
        if shapes != {name: saved[name].shape for name in shapes.keys() & saved.keys()}:
            raise UserError(f"{folder}: its averaged weights are of another model; resume with the same")
        for name, tensor in ema.average.items():
            tensor.copy_(like(saved[name].to(tensor.device), tensor))
    names = _names(model)
    tensors = _read_optimizer(folder, {name: parameter for parameter, name in names.items()})
    own = {f"{n}/{names[p]}" for n, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    found = {key.rpartition("/")[0] for key in tensors}
    # An objective that has not begun has no state.
    if tensors and not {name for name in own if PREFIX not in name} <= found <= own:
        raise UserError(f"{folder}: its optimizer state is of another optimizer or model; resume with the same")
    for number, optimizer in enumerate(optimizers):
        _fill_optimizer(optimizer, names, f"{number}/", tensors)


def _beside(file: Path) -> dict[str, torch.Tensor]:
    return tensors_in(file) if file.exists() else {}


def _read_optimizer(folder: Path, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the saved state of the optimizers, as sharded as the parameters are."""

    def of_parameter(key: str, shape: torch.Size) -> torch.Tensor | None:
        parameter = parameters.get(key.partition("/")[2].rpartition("/")[0])
        return parameter.detach() if parameter is not None and parameter.shape == shape else None

    if not (folder / "optimizer").exists():
        tensors = tensors_in(folder / "optimizer.safetensors")
        found = {key: of_parameter(key, tensor.shape) for key, tensor in tensors.items()}
        return {
            key: tensor if found[key] is None else like(tensor.to(found[key].device), found[key])
            for key, tensor in tensors.items()
        }
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder / "optimizer"))
    tensors = {}
    try:
        for key, saved in reader.read_metadata().state_dict_metadata.items():
            parameter = of_parameter(key, saved.size)
            tensors[key] = torch.zeros(saved.size) if parameter is None else torch.zeros_like(parameter)
        dcp.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    except Exception as error:  # whatever a damaged header comes to inside of the library
        raise UserError(f"cannot read {folder / 'optimizer'}: {reason_of(error)}") from None
    return tensors


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    names = _names(model)
    return {
        f"{number}/{names[parameter]}/{key}": tensor.detach()
        for number, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def _fill_optimizer(optimizer, names: dict, prefix: str, tensors: dict) -> None:
    """Put the saved state of each parameter where `load_state_dict` expects it: by its number."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    for index, parameter in enumerate(parameters):
        own = f"{prefix}{names[parameter]}/"
        saved = {key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)}
        if saved:  # at step 0 there is none
            state[index] = saved
    try:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the optimizer state is of another optimizer ({error!r}); resume with the same") from None
