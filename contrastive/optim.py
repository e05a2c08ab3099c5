"""How weights move: optimizers by name, the learning rate as a function of the step, the moving average of weights."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import torch
from torch import nn

from contrastive import products
from contrastive.distributed.sharding import by_whole_matrices, local
from contrastive.errors import UserError
from contrastive.option_types import Bound, Positive
from contrastive.registry import Registry

LOGIT_PARAMETERS = ("logit_scale", "logit_bias")
EMBEDDINGS = ("patch_embed", "token_embedding", "class_token", "position_embedding", "pre_norm")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at zero, so five rounds are enough
ROUNDS = 5
COOLED_DOWN = ("wsd", "rsqrt")  # decays whose first steps do not depend on how many there will be


class OptimizerConfig(Protocol):
    """The options of an optimizer: a frozen dataclass registered in OPTIMIZERS."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return the optimizers that step together; each group has its peak learning rate as `peak_lr`."""


OPTIMIZERS: Registry[type[OptimizerConfig]] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices only."""

    lr: Positive[float] = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, multiplied by the learning rate."""
    beta2: float = 0.95
    """Decay of the squared gradient's average; 0.95 stands large-batch loss spikes better than 0.999."""
    eps: float = 1e-6
    """Added to the denominator."""
    logit_lr_factor: float = 1.0
    """Learning rate of logit_scale and logit_bias, as a multiple of lr."""
    layer_decay: Annotated[float, Bound("it must be above 0 and at most 1", lambda decay: 0 < decay <= 1)] = 1.0
    """Learning rate of a block as a share of that of the block above it; 1: all alike. 0.65 to 0.9 to fine-tune."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [_adamw(_trainable(model), self, layer_factors(model, self.layer_decay))]


@OPTIMIZERS.register("muon")
@dataclass(frozen=True)
class MuonConfig(AdamWConfig):
    """Muon (Jordan et al. 2024) for the transformers' matrices, AdamW for everything else."""

    muon_lr: float = 0.02
    """Peak learning rate of the matrices, whose updates are orthogonalised."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        parameters, factors = _trainable(model), layer_factors(model, self.layer_decay)
        hidden = {n: p for n, p in parameters.items() if p.ndim == 2 and "transformer.blocks" in n}
        others = {n: p for n, p in parameters.items() if n not in hidden}
        if not hidden:  # the towers are frozen
            return [_adamw(others, self, factors)]
        muon = Muon(
            [
                {"params": [p for n, p in hidden.items() if factors[n] == factor], "peak_lr": self.muon_lr * factor}
                for factor in sorted({factors[n] for n in hidden})
            ],
            lr=self.muon_lr,
            weight_decay=self.weight_decay,
        )
        return [muon, _adamw(others, self, factors)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that get gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _adamw(parameters: dict[str, nn.Parameter], config: AdamWConfig, factors: dict[str, float]) -> torch.optim.AdamW:
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = config.logit_lr_factor if name in LOGIT_PARAMETERS else factors[name]
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0  # not for biases, norms, tokens and scalars
        # Scalars by themselves: they are whole where the rest is sharded, and fused kernels take only one kind.
        groups.setdefault((decay, config.lr * factor, parameter.ndim == 0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "peak_lr": lr} for (decay, lr, _), group in groups.items()],
        lr=config.lr,
        betas=(0.9, config.beta2),
        eps=config.eps,
        fused=next(iter(parameters.values())).device.type in ("cuda", "cpu"),
    )


def step_unless(skipped: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Do a step, unless `skipped` (bool, 0-dim): then weights and state stay, even where gradients are not finite.

    The device decides for fused optimizers and Muon, in the way that torch's GradScaler has them do it; for others it
    is waited for.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skipped.float()
        optimizer.step()
    elif not skipped:
        optimizer.step()


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied by, by name.

    It falls from a tower's top to its bottom (Clark et al. 2020, "ELECTRA"; Bao et al. 2021, "BEiT"). The last block
    has `decay`, each one below it `decay` times the one above, the patch or token embedding with its positions that
    of a block below the first. All above the blocks, heads included, has 1.
    """
    towers = {name: tower for name, tower in model.named_children() if hasattr(tower, "transformer")}
    depths = {name: len(tower.transformer.blocks) for name, tower in towers.items()}
    return {name: decay ** _layers_below_top(name, depths) for name, _ in model.named_parameters()}


def _layers_below_top(name: str, depths: dict[str, int]) -> int:
    tower, _, rest = name.partition(".")
    if tower not in depths:
        return 0
    block = re.match(r"transformer\.blocks\.(\d+)\.", rest)
    if block:
        return depths[tower] - int(block[1])
    return depths[tower] + 1 if rest.split(".")[0] in EMBEDDINGS else 0


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose matrices are orthogonalised.

    For two-dimensional parameters, with decoupled weight decay. Of sharded ones each rank orthogonalises some, whole.

    Differs from torch.optim.Muon in two ways: matrices of one shape are orthogonalised together, which is
    faster for the many small ones of a transformer; and on a CPU that runs in float32, because in bfloat16
    the rounding of a different number of ranks grows to a few parts in 10,000 of the loss within three steps.

    Args:
        params: matrices, or groups of them.
        lr: learning rate; a matrix (m, n) is moved by lr · sqrt(max(1, m / n)) in each singular direction.
        weight_decay: multiplied by lr.
        momentum: of the gradient's average, Nesterov style.
    """

    def __init__(self, params, lr: float = 0.02, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._step_supports_amp_scaling = True  # as torch calls it: `step` heeds `found_inf`
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self) -> None:
        """Move the matrices, unless `found_inf` is 1: then nothing changes, whatever the gradients are."""
        skipped = self.found_inf > 0
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            kept = torch.where(skipped, 1.0, 1 - group["lr"] * group["weight_decay"])
            for shape, parameters in by_shape.items():
                moves = self._nesterov(parameters, group["momentum"], skipped)
                updates = by_whole_matrices(orthogonalise, moves, parameters[0]) * ~skipped
                rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                own = [local(parameter) for parameter in parameters]
                torch._foreach_mul_(own, kept)
                torch._foreach_add_(own, list(updates.unbind()), alpha=-rate)

    def _nesterov(self, parameters: list[torch.Tensor], momentum: float, skipped: torch.Tensor) -> torch.Tensor:
        """Update the averages of k matrices (m, n) with their gradients; return what to move by, (k, m, n).

        Of sharded ones it is this rank's rows of each.
        """
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [local(self.state[parameter]["momentum"]) for parameter in parameters]
        # A gradient that equals its average leaves it as it is.
        gradients = torch.where(skipped, torch.stack(averages), torch.stack([local(p.grad) for p in parameters]))
        torch._foreach_lerp_(averages, list(gradients.unbind()), 1 - momentum)
        return gradients.lerp(torch.stack(averages), momentum)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of each (m, n) matrix in a stack (k, m, n) near 1, by Newton-Schulz rounds.

    They end between about 0.7 and 1.2, which serves as well as exactly 1. Same shape and dtype out.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    if x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if products.ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:  # which knows no stacks
        x = torch.stack([_newton_schulz(each, products.product) for each in x])
    else:
        x = _newton_schulz(x, lambda left, right: left @ right.mT)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).to(matrices.dtype)


def _newton_schulz(x: torch.Tensor, times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The rounds, for one matrix or a stack; `times` multiplies the first with the second transposed."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        gram = times(x, x)  # symmetric, so its square is gram · gramᵀ
        x = a * x + times(b * gram + c * times(gram, gram), x.mT)
    return x


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then decay."""

    warmup_steps: int | None = None
    """Steps of linear warm-up; none: 3 % of the run, at least 100 steps but at most a tenth of it."""
    decay: Literal["cosine", "linear", "constant", "wsd", "rsqrt"] = "cosine"
    """From the peak to final_fraction; wsd stays there, rsqrt falls as 1 / sqrt(step), until a linear cooldown."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak; of rsqrt's, of where the cooldown begins."""
    cooldown_steps: Positive[int | None] = None
    """Last steps, in which wsd and rsqrt fall to final_fraction; none: a fifth of the run."""

    def resolved(self, total_steps: int) -> "ScheduleConfig":
        """Return it with its warm-up settled, where longer runs begin alike; UserError where it exceeds the run."""
        if self.decay in ("cosine", "linear"):
            return self
        warmup, cooldown = self._ramps(total_steps)
        if self.decay in COOLED_DOWN and warmup + cooldown > total_steps:
            said = f"warmup_steps {warmup} and cooldown_steps {cooldown} are more than the {total_steps} of the run"
            raise UserError(f"schedule: {said}; give fewer")
        return replace(self, warmup_steps=warmup)

    def factor(self, step: int, total_steps: int) -> float:
        """Return what the peak learning rate is multiplied by at `step`, counted from 0, of `total_steps`."""
        warmup, cooldown = self._ramps(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.decay == "constant":
            return 1.0
        if self.decay in COOLED_DOWN:
            peak = math.sqrt(max(warmup, 1) / max(step, 1)) if self.decay == "rsqrt" else 1.0  # as in big_vision
            fallen = max(0.0, 1 - (total_steps - step) / cooldown)
            return peak * (1 - (1 - self.final_fraction) * fallen)
        done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.final_fraction + (1 - self.final_fraction) * remaining

    def _ramps(self, total_steps: int) -> tuple[int, int]:
        """Steps of warm-up and of cooldown."""
        usual = min(max(round(0.03 * total_steps), 100), total_steps // 10)
        warmup = usual if self.warmup_steps is None else self.warmup_steps
        return warmup, self.cooldown_steps or max(1, total_steps // 5)


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class ExponentialMovingAverage:
    """average ← decay · average + (1 − decay) · weight after every step, in float32.

    The first steps use min(decay, (1 + step) / (10 + step)), so that random initial weights fade soon.

    Args:
        model: its parameters that learn are averaged, starting from their present values.
        decay: 0.999 averages about 1,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: torch.Tensor) -> None:
        """Move the averages towards the weights; where `skipped` (bool, 0-dim, on their device) leave them."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(average) for average in self.average.values()]
        weights = [local(p.detach()).float() for name, p in model.named_parameters() if name in self.average]
        moved = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(moved, torch.where(skipped, 0.0, 1 - decay))
        torch._foreach_add_(averages, moved)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averages; a second call undoes it."""
        for name, average in self.average.items():
            parameter = model.get_parameter(name)
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)
