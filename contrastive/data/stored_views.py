"""A teacher's embeddings of K views of each image and of its captions, in a folder; training draws the views again.

config.json        the teacher, the data, how the views are drawn; `complete` once all is there
images-00000.npy   (n, K, E): of n samples, from 0 * samples_per_shard on; NaN where an image could not be read
texts-00000.npy    (m, E): of all captions of these samples, one after the other; NaN where one cannot be used
starts-00000.npy   (n + 1,) int64: where in them the captions of a sample begin, and the last end
seen.npy           (P, 3, 32, 32) uint8: the first view of P images, by which it is noticed that draws have changed

MobileCLIP's data reinforcement (Vasu et al. 2024), but for the views' parameters: a view is a pure function of
(options, index of the sample, number of the view), so that nothing of it has to be kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive.config import from_dict
from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.order import VIEWS, philox
from contrastive.data.record import BadSample, Source
from contrastive.errors import UserError, reason_of
from contrastive.files import claim_folder, read_json, write_json, write_whole

FORMAT = "contrastive-views-1"
CONFIG = "config.json"
FILES = ("images", "texts", "starts")
SEEN, SEEN_SIZE, NUM_SEEN = "seen.npy", 32, 8
MOST_DIFFERENCE = 2.0
"""In steps of 255, on average over a view: libraries round otherwise; another crop is some 30 away."""


@dataclass(frozen=True)
class Views:
    """K variations of each image, numbered, which anybody can draw again."""

    count: int
    augment: AugmentConfig

    def draws(self, index: int, number: int) -> np.random.Generator:
        """Return what view `number` of sample `index` is varied by. One of K views is one of more views too."""
        return np.random.Generator(philox(0, index, VIEWS, number))

    def pixels(self, image: Any, index: int, number: int, image_size: int) -> torch.Tensor:
        """Return a view as uint8 (3, S, S). BadSample as from `decode`."""
        return augment(image, image_size, self.augment, self.draws(index, number))

    def of(self, image: Any, index: int, image_size: int) -> torch.Tensor:
        """Return all of them, uint8 (K, 3, S, S)."""
        return torch.stack([self.pixels(image, index, number, image_size) for number in range(self.count)])


class StoredViews:
    """A folder of such embeddings; made by `claim_views`, or found by `find_views`. Loader workers read it."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.config = folder, config
        where = f"{folder / CONFIG}: views.augment"
        self.views = Views(config["views"]["count"], from_dict(AugmentConfig, config["views"]["augment"], where))
        self.samples_per_shard: int = config["samples_per_shard"]
        self._open: dict[int, tuple[np.ndarray, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # maps of files, which would be sent to a worker as all that is in them

    @property
    def path(self) -> str:
        """The teacher's, as it was when it embedded them."""
        return self.config["model"]["path"]

    @property
    def key(self) -> str:
        """What says which views of which teacher these are."""
        return f"{self.config['model']['weights']} {json.dumps(self.config['views'], sort_keys=True)}"

    @property
    def embed_dim(self) -> int:
        return self.config["embed_dim"]

    @property
    def logit_scale(self) -> float:
        """The teacher's own factor on similarities."""
        return self.config["logit_scale"]

    @property
    def num_shards(self) -> int:
        return -(-self.config["data"]["num_samples"] // self.samples_per_shard)

    def indices(self, shard: int) -> range:
        """The samples of a shard."""
        first = shard * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.config["data"]["num_samples"]))

    def _path(self, part: str, shard: int) -> Path:
        return self.folder / f"{part}-{shard:05d}.npy"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        shards = range(self.num_shards)
        return [shard for shard in shards if not all(self._path(part, shard).exists() for part in FILES)]

    def write(self, shard: int, images: np.ndarray, texts: np.ndarray, starts: np.ndarray) -> None:
        """Write a shard, each file whole or not at all."""
        for part, values in zip(FILES, (images, texts, starts), strict=True):
            write_whole(self._path(part, shard), lambda file, values=values: np.save(file, values))

    def finish(self, source: Source) -> None:
        """Write down that all shards are there, and what some views look like."""
        seen = np.stack([view.numpy() for view in self._seen_again(source)])
        write_whole(self.folder / SEEN, lambda file: np.save(file, seen))
        self.config["complete"] = True
        write_json(self.folder / CONFIG, self.config)

    def _seen_again(self, source: Source) -> list[torch.Tensor]:
        """The first view, small, of up to NUM_SEEN images spread over the source; white for one that cannot be read."""
        views = []
        for index in np.unique(np.linspace(0, len(source) - 1, NUM_SEEN).astype(np.int64)).tolist():
            try:
                views.append(self.views.pixels(source[index].image, index, 0, SEEN_SIZE))
            except BadSample:
                views.append(torch.full((3, SEEN_SIZE, SEEN_SIZE), 255, dtype=torch.uint8))
        return views

    def check(self, source: Source, augmented: AugmentConfig) -> None:
        """Check all that can be before training from it.

        Args:
            augmented: how the run varies its images, which the views have to be drawn by.

        Raises:
            UserError: unfinished or damaged; of other data; of views drawn otherwise, or now drawn otherwise.
        """
        if not self.config.get("complete"):
            raise UserError(f"{self.folder} is unfinished; give its contrastive embed command again")
        if any(part.prompted for part in source.parts):
            raise UserError(
                f"{self.folder} holds embeddings of captions, and {source.name} is learned by prompts of its classes: "
                "give the teacher itself"
            )
        data = self.config["data"]
        if data["fingerprint"] != source.stored.fingerprint or data["num_samples"] != len(source):
            raise UserError(
                f"{self.folder} holds a teacher's embeddings of other data ({data['name']}), not of {source.name} as "
                "it is now; embed this with contrastive embed --views"
            )
        for name, held in asdict(self.views.augment).items():
            if getattr(augmented, name) != held:
                raise UserError(
                    f"data.augment.{name} is {getattr(augmented, name)}, but the views of {self.folder} were drawn "
                    f"with {held}: give the same, or embed again"
                )
        for shard in range(self.num_shards):
            self._shard(shard)
        now, then = self._seen_again(source), self._load(self.folder / SEEN)
        if then.shape != (len(now), 3, SEEN_SIZE, SEEN_SIZE):
            raise UserError(f"{self.folder / SEEN} is damaged; delete {self.folder} and embed again")
        for view, kept in zip(now, then, strict=True):
            if np.abs(view.numpy().astype(np.int16) - kept).mean() > MOST_DIFFERENCE:
                raise UserError(
                    f"{self.folder} holds a teacher's embeddings of views that come out otherwise here, by other "
                    "images under the same names, or other versions of contrastive or torchvision; embed again"
                )

    def image(self, index: int, number: int) -> torch.Tensor:
        """Return the embedding of view `number` of a sample, float32 (E,), unit length. BadSample if it has none."""
        shard, place = divmod(index, self.samples_per_shard)
        return _usable(self._shard(shard)[0][place, number])

    def texts(self, index: int, captions: Sequence[int]) -> torch.Tensor:
        """Return the embeddings of a sample's captions, by their numbers from 0, (K, E) likewise."""
        shard, place = divmod(index, self.samples_per_shard)
        _, texts, starts = self._shard(shard)
        own = texts[starts[place] : starts[place + 1]]
        if max(captions) >= len(own):
            raise BadSample("no_embedding")
        return _usable(own[list(captions)])

    def _shard(self, shard: int) -> tuple[np.ndarray, ...]:
        """Its images, texts and starts, in memory as they are read."""
        if shard not in self._open:
            arrays = tuple(self._load(self._path(part, shard)) for part in FILES)
            n, (images, texts, starts) = len(self.indices(shard)), arrays
            of_images, ends = (n, self.views.count, self.embed_dim), (starts.shape == (n + 1,) and int(starts[-1]))
            if images.shape != of_images or texts.shape != (ends, self.embed_dim):
                raise UserError(f"{self._path('images', shard)} is not of {self.folder}; delete it and embed again")
            self._open[shard] = arrays
        return self._open[shard]

    def _load(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({reason_of(error)}); delete it and embed again") from None


def _usable(rows: np.ndarray) -> torch.Tensor:
    rows = rows.astype(np.float32)
    if np.isnan(rows).any():
        raise BadSample("no_embedding")
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=-1, keepdims=True))  # float16 rounds their lengths


def views_config(
    model: Mapping[str, Any], embed_dim: int, logit_scale: float, source: Source, views: Views, **options
) -> dict[str, Any]:
    """Return what says whose views a folder holds.

    Args:
        model: what is to be said of the teacher: 'path', 'key', 'weights' and 'preprocess'.
        options: dtype, precision and samples_per_shard.
    """
    data = {"name": source.name, "fingerprint": source.stored.fingerprint, "num_samples": len(source)}
    whose = {"model": dict(model), "embed_dim": embed_dim, "logit_scale": logit_scale}
    config = {"format": FORMAT, **whose, "data": data, "views": asdict(views), **options}
    return json.loads(json.dumps(config))  # as config.json gives it back: tuples as lists


def claim_views(folder: Path, config: dict[str, Any]) -> StoredViews:
    """Begin the folder that `views_config` describes, or go on with one begun by the same.

    Raises:
        UserError: the folder holds something else, or embeddings of another teacher, other data, views or options.
    """
    held = claim_folder(folder, CONFIG, "stored views", "choose another folder")
    if held is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
        return StoredViews(folder, config)
    if held.get("format") != FORMAT:
        raise UserError(f"{folder} holds something else than stored views; choose another folder")
    for name, value in config.items():
        before = held.get(name)
        if name == "model" and isinstance(before, dict):  # in any folder it is the same model
            before = {**before, "path": value["path"]}
        if before != value:
            named = {"model": "another teacher", "data": "other data", "views": "other views"}
            what = named.get(name, f"{name} {before}, not {value}")
            raise UserError(f"{folder} was begun with {what}; give the same again, or choose another folder")
    return StoredViews(folder, held)


def find_views(folder: Path) -> StoredViews | None:
    """Return the stored views in `folder`; None where there are none. UserError where its config.json is damaged."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = read_json(folder / CONFIG)
    except UserError:
        return None
    if config.get("format") != FORMAT:
        return None
    try:
        data, model = config["data"], config["model"]
        numbers = config["embed_dim"], config["samples_per_shard"], data["num_samples"], config["views"]["count"]
        texts = data["name"], data["fingerprint"], model["path"], model["weights"]
        if not all(type(number) is int and number > 0 for number in numbers) or not config["logit_scale"] > 0:
            raise ValueError("numbers that are none of stored views")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("something else stands where names do")
        return StoredViews(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({reason_of(error)}); delete it and embed again") from None
