"""Fine-tuning that keeps what it started from in mind: WiSE-FT (Wortsman et al. 2022)."""

import json
from pathlib import Path

import torch

from contrastive.data.record import Source
from contrastive.distributed.runtime import Runtime
from contrastive.evaluate.classification import classification
from contrastive.evaluate.zero_shot import zero_shot
from contrastive.files import write_folder
from contrastive.interop.bundle import Bundle, save_model
from contrastive.log import say
from contrastive.models import ImageClassifier
from contrastive.train.classification_task import ClassificationTask
from contrastive.train.classifier_settings import FinetuneConfig
from contrastive.train.run_folder import RunFolder


class WiseFT(ClassificationTask):
    """Classification by a tower of a dual encoder, whose head started from prompts.

    At the end, models whose every weight lies between the first and the tuned ones are scored, on the held-out
    data and, zero-shot, on `others`.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: ImageClassifier,
        source: Source,
        held_out: list[Source],
        bundle: Bundle,
        others: list[Source],
    ):
        super().__init__(config, model, source, held_out)
        self.bundle, self.others = bundle, others
        self._first = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    def conclude(self, folder: RunFolder, runtime: Runtime) -> None:
        """Score the interpolations, leave the model at the share to be saved, and write curve and dual encoder."""
        tuned = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}
        rows = []
        for alpha in self.config.wise_ft.alphas:
            self._interpolate(tuned, alpha)
            rows.append({"alpha": alpha, **self._scores(runtime)})
            shown = "  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items() if name != "alpha")
            say(f"WiSE-FT {alpha:.2f}  {shown}")
        self._interpolate(tuned, self.config.wise_ft.save)
        if runtime.is_main:
            self._write(folder.path, rows)

    def _interpolate(self, tuned: dict[str, torch.Tensor], alpha: float) -> None:
        first = self._first
        self.model.load_state_dict(
            {name: torch.lerp(first[name].to(weight.device), weight, alpha) for name, weight in tuned.items()}
        )
        self.bundle.model.image_tower.load_state_dict(self.model.image_tower.state_dict())

    def _scores(self, runtime: Runtime) -> dict[str, float]:
        """acc@1 by data: with the head on held-out data, zero-shot elsewhere."""
        options = self.config.evaluation
        how = {"device": runtime.device, "batch_size": options.batch_size, "limit": options.limit}
        scores = {source.name: classification(self, source, **how)["acc1"] for source in self.held_out}
        self.bundle.model.to(runtime.device)
        return scores | {
            f"zero-shot {other.name}": zero_shot(self.bundle, other, **how)["acc1"] for other in self.others
        }

    def _write(self, folder: Path, rows: list[dict[str, float]]) -> None:
        temporary = folder / "wise_ft.json.partial"
        temporary.write_text(json.dumps(rows, indent=1))
        temporary.replace(folder / "wise_ft.json")
        if len(rows) > 1 and len(rows[0]) > 1:
            _draw(rows, folder / "wise_ft.png")
        model = self.bundle.model
        write_folder(
            folder / "encoder",
            lambda temporary: save_model(
                temporary, model.state_dict(), model.config, self.preprocess.config, self.bundle.tokenizer
            ),
        )
        say(f"dual encoder with the tuned image tower: {folder / 'encoder'}")


def _draw(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in rows[0]:
        if name != "alpha":
            axes.plot([row["alpha"] for row in rows], [row[name] for row in rows], marker="o", markersize=3, label=name)
    axes.set(xlabel="share of the fine-tuned weights", ylabel="acc@1, %", title="Between zero-shot and fine-tuned")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
