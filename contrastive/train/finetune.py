"""Fine-tuning of a pretrained image tower, which keeps what it started from in mind: WiSE-FT (Wortsman et al. 2022)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch

from contrastive.data.class_joining import warn_of_ids
from contrastive.data.prompts import default_templates, load_templates
from contrastive.data.record import Source
from contrastive.data.sources import announce, open_source
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.evaluate.classification import classification, zero_shot, zero_shot_classifier
from contrastive.files import write_folder, write_json
from contrastive.interop.bundle import Bundle, save_model, weights_key
from contrastive.interop.loading import load
from contrastive.log import say
from contrastive.models import ClassifierConfig, ImageClassifier
from contrastive.option_types import Bound, Positive, Probability
from contrastive.train.classify import ClassificationTask, SupervisedConfig, check_supervised, num_classes, open_data
from contrastive.train.given import at_size, check_brought
from contrastive.train.options import resolve_run
from contrastive.train.run import open_run, run

N = TypeVar("N")
EachAShare = Annotated[N, Bound("each must be from 0 to 1", lambda value: 0 <= value <= 1)]


@dataclass(frozen=True)
class WiseFTConfig:
    """Interpolation of the zero-shot and the fine-tuned weights (WiSE-FT, Wortsman et al. 2022)."""

    alphas: EachAShare[tuple[float, ...]] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the fine-tuned weights that are scored when the run ends."""
    eval: tuple[str, ...] = ()
    """Other labelled data, scored zero-shot by the interpolated tower: what fine-tuning may have forgotten."""
    save: EachAShare[float] = 1.0
    """Share of the fine-tuned weights in the model that is saved; 0.5 is usual."""


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Everything a fine-tuning can be told."""

    init: str = ""
    """The pretrained model: a run, checkpoint or model folder."""
    init_key: str | None = None
    """Hash of its weights, which a resumed run compares; filled in when the run starts."""
    image_size: Positive[int | None] = None
    """Height and width of the images in pixels, for which positions are resampled; none: the model's own."""
    head: Literal["auto", "zero_shot", "zeros"] = "auto"
    """How the linear head starts: from the text embeddings of prompts, or at zero. auto: from prompts, where the model
    has a text tower and the data class names."""
    templates: str = "auto"
    """Prompt templates of that head: a set's name, a file with one template a line, or auto."""
    tune: Literal["all", "head"] = "all"
    """head: the image tower stays as it is."""
    dropout: Probability[float] = 0.0
    """Dropout probability in the image tower."""
    wise_ft: WiseFTConfig = field(default_factory=WiseFTConfig)


def finetune(config: FinetuneConfig) -> bool:
    """Fine-tune the image tower of `config.init` on labelled data; otherwise as `train_classifier`.

    Where the head starts from prompts, the run ends with WiSE-FT's curve: `wise_ft.json`, `wise_ft.png`, and the
    dual encoder with the tuned image tower in `encoder/`.
    """
    if not config.init:
        raise UserError("no model to fine-tune: contrastive finetune MODEL --data SPEC")
    bundle = load(config.init)
    bundle.check_image_tower("there is nothing to fine-tune")
    check_supervised(config)
    checkpoint = open_run(config)
    key = weights_key(bundle.model)
    if checkpoint is not None and config.init_key not in (None, key):
        raise UserError(
            f"{bundle.path} is not the model that {config.run_folder} started from: its weights have changed; put the "
            "old ones back, or start again with another --out"
        )
    bundle, config = at_size(bundle, config.image_size), replace(config, init_key=key)
    source, held_out, config = open_data(config)
    data = replace(config.data, preprocess=bundle.preprocess.config.options)
    check_brought(config, replace(config, data=data), "init")
    config = replace(config, data=data, head=_kind_of_head(config, bundle, source))
    config = resolve_run(config, source, bundle.config.image)
    torch.manual_seed(config.train.seed)
    model = _classifier_from(bundle, config, source)
    if config.tune == "head":
        model.image_tower.requires_grad_(False).eval()
    if config.head == "zero_shot":
        others = [open_source(spec) for spec in config.wise_ft.eval]
        for other in others:
            announce(other, "wise_ft.eval")
            _check_named(other, "wise_ft.eval")
        task = WiseFT(config, model, source, held_out, bundle, others)
    else:
        wise_ft = config.wise_ft
        for name, value, unused in (("save", wise_ft.save, 1), ("eval", " ".join(wise_ft.eval), "")):
            if value != unused:
                raise UserError(
                    f"wise_ft.{name} is {value}, which needs a head that starts from prompts; this one starts from "
                    "zeros: leave it out"
                )
        task = ClassificationTask(config, model, source, held_out)
    say(f"starting from {bundle.path}; the head starts from {'prompts' if config.head == 'zero_shot' else 'zeros'}")
    return run(task, checkpoint)


def _kind_of_head(config: FinetuneConfig, bundle: Bundle, source: Source) -> str:
    possible = bundle.tokenizer and source.class_names is not None
    if config.head == "auto":
        return "zero_shot" if possible else "zeros"
    if config.head == "zero_shot":
        bundle.check_text_tower("--head zero_shot needs one; use --head zeros")
        _check_named(source, "--head zero_shot")
    return config.head


def _check_named(source: Source, needs: str) -> None:
    if source.class_names is None:
        raise UserError(f"{needs} needs class names, which {source.name} has not: put a classnames.txt beside the data")


def _classifier_from(bundle: Bundle, config: FinetuneConfig, source: Source) -> ImageClassifier:
    """Return a classifier with the bundle's image tower and a head made from prompts or of zeros."""
    from_prompts = config.head == "zero_shot"
    image = replace(bundle.config.image, dropout=config.dropout, patch_dropout=0.0)
    classes = num_classes(source, None)
    model = ImageClassifier(ClassifierConfig(image, bundle.model.config.embed_dim, classes, unit_features=from_prompts))
    model.image_tower.load_state_dict(bundle.model.image_tower.state_dict())
    if from_prompts:
        templates = default_templates(source) if config.templates == "auto" else load_templates(config.templates)
        names = source.class_names
        warn_of_ids(source)
        rows = zero_shot_classifier(bundle.model, bundle.tokenizer, names, templates, device="cpu")
        with torch.no_grad():
            # The scale makes cosines the logits that training saw; a bias would be the same for all classes.
            model.head.weight.copy_(rows * bundle.model.logit_scale.exp())
    return model


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

    def conclude(self, folder: Path, runtime: Runtime) -> None:
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
            self._write(folder, rows)

    def _interpolate(self, tuned: dict[str, torch.Tensor], alpha: float) -> None:
        first = self._first
        self.model.load_state_dict(
            {name: torch.lerp(first[name].to(weight.device), weight, alpha) for name, weight in tuned.items()}
        )
        self.bundle.model.image_tower.load_state_dict(self.model.image_tower.state_dict())

    def _scores(self, runtime: Runtime) -> dict[str, float]:
        """acc@1 by data: with the head on held-out data, zero-shot elsewhere."""
        how = self.how_to_evaluate(runtime)
        scores = {source.name: classification(self, source, **how)["acc1"] for source in self.held_out}
        self.bundle.model.to(runtime.device)
        return scores | {
            f"zero-shot {other.name}": zero_shot(self.bundle, other, **how)["acc1"] for other in self.others
        }

    def _write(self, folder: Path, rows: list[dict[str, float]]) -> None:
        write_json(folder / "wise_ft.json", rows)
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
