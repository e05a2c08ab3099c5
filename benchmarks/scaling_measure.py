"""What runs in the processes that benchmarks/scaling.py starts, one a rank: losses, time, and bytes sent by part."""

import json
import os
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive.data.loader import train_loader
from contrastive.data.order import Order
from contrastive.data.sources import open_source
from contrastive.distributed.runtime import Runtime
from contrastive.distributed.sharding import average_whole_gradients, clip_gradients
from contrastive.losses import LOSSES, all_pairs
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.presets import model_config
from contrastive.models.transformer import Transformer
from contrastive.optim import OPTIMIZERS
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig, resolve
from contrastive.train.counting import Exchange, step_traffic
from contrastive.train.options import TrainConfig

WARM_UP = 2  # steps; the first allocates what the others find
TINY = {"width": 64, "depth": 2, "num_heads": 2, "mlp_dim": 128}


@dataclass(frozen=True)
class Case:
    """What is trained, and by how many."""

    ranks: int
    sharded: bool
    model: str
    image_size: int
    loss: str
    duplicates: str
    optimizer: str
    batch: int
    accumulate: int
    steps: int


class Sent(TorchDispatchMode):
    """Meanwhile counts the bytes that this rank sends, by the part of a step that is named; Python's or torch's own.

    Of a collective it is what the usual ring sends, of a point-to-point message its size.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.part, self.bytes = ranks, None, Counter()

    @contextmanager
    def of(self, part: str | None):
        """Meanwhile all that is sent counts as `part`'s."""
        before, self.part = self.part, part
        yield
        self.part = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it does to its parts
        result = func(*args, **(kwargs or {}))
        if namespace in ("c10d", "_c10d_functional"):
            self._count(name, args, result)
        return result

    def _count(self, name: str, args, result) -> None:
        passed_on = (self.ranks - 1) / self.ranks
        if name in ("wait_tensor", "_wrap_tensor_autograd", "recv_"):
            return
        if name in ("allreduce_", "all_reduce", "all_reduce_"):
            part, sent = "gradients", 2 * passed_on * _bytes(args[0])
        elif name == "_reduce_scatter_base_":
            part, sent = "gradients", passed_on * _bytes(args[1])
        elif name == "_allgather_base_":
            part, sent = "weights", passed_on * _bytes(args[0])
        elif name.startswith("all_gather"):  # as DTensor does it
            part, sent = "weights", passed_on * _bytes(result)
        elif name == "send":
            part, sent = "loss", _bytes(args[0])
        else:
            raise NotImplementedError(f"what a rank sends in torch's collective {name}")
        self.bytes[self.part or part] += sent


def _bytes(tensors) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


class Steps:
    """A run's own task, optimizers and step on this rank's share of the same batches."""

    def __init__(self, case: Case, runtime: Runtime):
        self.case, self.runtime = case, runtime
        source = open_source("scenes:val")  # few, so that the tokenizer is trained in no time
        config = PretrainConfig(
            model=_towers(case),
            loss=replace(LOSSES.get(case.loss)(), duplicates=case.duplicates),
            optimizer=OPTIMIZERS.get(case.optimizer)(),
            train=TrainConfig(steps=WARM_UP + case.steps + 1, global_batch_size=case.batch, accumulate=case.accumulate),
        )
        tokenizer = replace(config.data, tokenizer="bpe", vocab_size=400).make_tokenizer(source, 16)
        self.config = resolve(config, source, tokenizer)
        self.task = ContrastiveTask(self.config, source, tokenizer, held_out=[])
        self.model = self.task.model.to(runtime.device)
        self.computed = self._computed()
        blocks = [block for part in self.model.modules() if isinstance(part, Transformer) for block in part.blocks]
        self.wrapped = runtime.wrap(self.model, blocks)
        self.optimizers = self.config.optimizer.build(self.model)
        if case.ranks > 1 and not case.sharded:
            # As DDP does by itself, but where torch can be watched.
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            self.wrapped.register_comm_hook(None, allreduce_hook)
        where = {"rank": runtime.rank, "world_size": case.ranks, "num_steps": self.config.train.steps}
        dataset = self.task.dataset(Order(len(source), case.batch, seed=0))
        self.batches = iter(list(train_loader(dataset, **where)))
        self.sent = Sent(case.ranks)
        self.done = 0

    def _computed(self) -> dict[str, float]:
        case = self.case
        how = Exchange(
            world_size=case.ranks,
            sharded=case.sharded,
            accumulate=case.accumulate,
            nccl=False,
            loss=case.loss,
            duplicates=case.duplicates,
            global_batch_size=case.batch,
            embed_dim=self.config.model.embed_dim,
        )
        return step_traffic(self.model, self.config.optimizer.build(self.model), how)

    def one(self) -> torch.Tensor:
        """Do the next step; return this rank's loss."""
        task, sent = self.task, self.sent
        loss = task.forward_backward(self.wrapped, task.inputs(next(self.batches)), self.done, self.runtime)["loss"]
        if self.case.sharded:
            average_whole_gradients(self.model.parameters())
        with sent.of("control"):
            clip_gradients(self.model.parameters(), self.config.train.max_grad_norm)
        with sent.of("optimizer"), torch.no_grad():
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            task.after_update(self.done, torch.zeros((), dtype=torch.bool, device=loss.device))
        self.done += 1
        return loss

    def counted(self) -> dict[str, float]:
        """Do a step and return the bytes that this rank sent in it, by part."""
        loss, check, sent = self.task.loss.forward, all_pairs.check_inputs, self.sent

        def of_loss(*args, **kwargs):
            with sent.of("loss"):
                return loss(*args, **kwargs)

        def of_check(*args):
            with sent.of("control"):  # ranks agree that their features have one shape
                return check(*args)

        self.task.loss.forward, all_pairs.check_inputs = of_loss, of_check
        with sent:
            self.one()
        self.task.loss.forward, all_pairs.check_inputs = loss, check
        return dict(sent.bytes)


def measure(rank: int, case: Case, port: int, folder: str) -> None:
    """Train as `case` says; write folder/RANK.json: losses, samples a second, bytes measured and computed."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ways = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if case.sharded else {}
    os.environ |= {name: str(value) for name, value in {**places, **meeting, **ways}.items()}
    runtime = Runtime("fp32")
    steps = Steps(case, runtime)
    losses = [steps.one() for _ in range(WARM_UP)]
    runtime.barrier()
    started = time.perf_counter()
    losses += [steps.one() for _ in range(case.steps)]
    runtime.barrier()
    seconds = time.perf_counter() - started
    found = {
        **asdict(case),
        "parameters": sum(p.numel() for p in steps.model.parameters()),
        "losses": [loss.item() for loss in losses],
        "samples_per_second": case.batch * case.steps / seconds,
        "sent": steps.counted(),
        "computed": steps.computed,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    runtime.barrier()
    runtime.close()


def _towers(case: Case) -> ModelConfig:
    if case.model == "tiny":
        image = ImageTowerConfig(image_size=case.image_size, patch_size=8, **TINY)
        return ModelConfig(embed_dim=64, image=image, text=TextTowerConfig(context_length=16, **TINY))
    config = model_config(case.model)
    text = replace(config.text, context_length=16, vocab_size=None, eos_id=None, pad_id=None)
    return replace(config, image=replace(config.image, image_size=case.image_size), text=text)
