"""Defaults, then files, then flags; and every mistake is one line."""

import contextlib
import io
import statistics
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import pytest
import yaml
from tyro.conf import Positional, arg

from contrastive.config import from_dict, parse, to_dict
from contrastive.errors import UserError
from contrastive.named_sections import preset, slot, take_option
from contrastive.registry import Registry

PETS = Registry("pet")


@PETS.register("cat")
@dataclass(frozen=True)
class Cat:
    lives: int = 9
    """How many."""
    indoor: bool = False
    """Whether."""


@PETS.register("dog")
@dataclass(frozen=True)
class Dog:
    tricks: tuple[str, ...] = ()
    """Which."""
    indoor: bool = True
    """Whether."""


@dataclass(frozen=True)
class House:
    rooms: int = 3
    """How many."""
    height: float = 2.5
    """In metres."""


def house(name):
    if name != "villa":
        raise UserError(f"unknown house '{name}'")
    return House(rooms=12)


@dataclass(frozen=True)
class Family:
    """A family."""

    name: str = "Smith"
    """Surname."""
    mood: Literal["good", "bad"] = "good"
    """Today's."""
    income: float | None = None
    """A year."""
    range: tuple[float, float] = (0.0, 1.0)
    """Of something."""
    pet: Cat = slot(PETS, "cat")
    house: House = preset(house, House, lambda: "villa  9 rooms")
    other: House = field(default_factory=House)


def run(*args, file=None):
    return parse(Family, list(args), file, prog="test", description="A test.")


def test_components_are_imported_when_they_are_asked_for():
    means = Registry("mean", {"plain": "statistics:mean", "absent": "no_such_module:mean"})
    assert means.names() == ("plain", "absent")
    assert means.get("plain") is statistics.mean and means.name_of(statistics.mean) == "plain"


def test_defaults_file_flags(file):
    path = file("name: Jones\nother: {rooms: 5, height: 1e-3}\nincome: 3\nrange: [0.5, 2]\npet: {indoor: true}")
    config = run("--other.rooms", "6", "--mood=bad", file=path)
    assert (config.name, config.mood, config.income, config.range) == ("Jones", "bad", 3.0, (0.5, 2.0))
    assert (config.other, config.pet) == (House(6, 0.001), Cat(indoor=True))
    assert run().range == (0.0, 1.0)


def test_hyphens_and_underscores():
    @dataclass(frozen=True)
    class Options:
        batch_size: int = 1
        """Size."""

    for flag in ("--batch_size", "--batch-size"):
        assert parse(Options, [flag, "3"], prog="t", description="").batch_size == 3


def test_slots_show_only_their_own_options(file):
    assert run("--pet", "dog", "--pet.tricks", "sit", "roll").pet == Dog(("sit", "roll"))
    assert run(file=file("pet: dog")).pet == Dog()
    assert run(file=file("pet: {name: dog, indoor: false}")).pet == Dog(indoor=False)
    with pytest.raises(UserError, match=r"unknown flag --pet.lives\. .*See --help"):
        run("--pet", "dog", "--pet.lives", "3")
    with pytest.raises(UserError, match="unknown pet 'dgo'. Did you mean 'dog'"):
        run("--pet", "dgo")


def test_flag_for_another_component_drops_the_files_options(file):
    assert run("--pet", "dog", file=file("pet: {name: cat, lives: 7}")).pet == Dog()
    assert run("--pet", "cat", file=file("pet: {name: cat, lives: 7}")).pet == Cat(lives=7)
    assert run("--pet", "dog", file=file("pet: {indoor: false}")).pet == Dog(indoor=False)


def test_presets(file):
    assert run("--house", "villa", "--house.height", "4").house == House(12, 4.0)
    assert run("--house", "villa", file=file("house: {height: 9.0}")).house == House(12)
    assert run(file=file("house: {name: villa, height: 9.0}")).house == House(12, 9.0)
    with pytest.raises(UserError, match="unknown house 'hut'"):
        run("--house", "hut")


def test_written_configuration_reads_back(file):
    config = run("--pet", "dog", "--pet.no_indoor", "--income", "2.5", "--range", "1", "2", "--house", "villa")
    path = file(yaml.safe_dump(to_dict(config)))
    assert asdict(run(file=path)) == asdict(config)
    assert from_dict(House, {"rooms": 1}, "x") == House(1)
    with pytest.raises(UserError, match="x: unknown key 'room'. Did you mean 'rooms'"):
        from_dict(House, {"room": 1}, "x")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nmae", "x"], "unknown flag --nmae. Did you mean 'name'"),
        (["--other.romos", "1"], "unknown flag --other.romos. Did you mean 'other.rooms'"),
        (["--huose", "villa"], "unknown flag --huose. Did you mean 'house'"),
        (["--other.rooms", "many"], "--other.rooms is 'many', expected int. See --help"),
        (["--income", "lots"], "--income is 'lots', expected float or none"),
        (["--range", "1", "x"], "--range is 'x', expected 2 values"),
        (["--mood", "fine"], "fine.*mood.*good"),
        (["--pet"], "--pet needs a name: one of cat, dog"),
        (["--name"], "name"),
        (["stray"], "stray"),
        (
            ["--name", "a.tar", "b.tar"],
            "--name takes one value, not also 'b.tar'; quote a pattern, or the shell .* --name 's",
        ),
        (["--name=a.tar", "b.tar", "c.tar", "--mood", "good"], "--name takes one value, not also 'b.tar'; quote a"),
        (["--other.rooms", "1", "2"], "Unrecognized options: 2. See --help"),
        (["--name", "a", "--pet", "cat", "stray"], "takes one value, cat, not also 'stray'"),
        (["--pet.indoor=no"], "--pet.indoor is a switch and takes no value, not 'no'. See --help"),
        (["--name=no", "--pet.indoor=no", "--pet", "dog"], "--pet.indoor is a switch and takes no value"),
        (["--pet.indoor", "no"], "Unrecognized options: no. See --help"),
    ],
)
def test_bad_flags_are_one_line(args, message):
    with pytest.raises(UserError, match=message) as error:
        run(*args)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as plain, contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")):
        run(*args)
    assert str(plain.value) == str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: x", "a.yaml: unknown key 'nmae'. Did you mean 'name'"),
        ("other: {romos: 1}", "unknown key 'other.romos'. Did you mean 'other.rooms'"),
        ("other: {rooms: many}", "other.rooms is 'many', expected int"),
        ("other: {rooms: 1.5}", "other.rooms is 1.5, expected int"),
        ("other: {rooms: true}", "other.rooms is True, expected int"),
        ("other: {height: tall}", "other.height is 'tall', expected float"),
        ("name: 3", "name is 3, expected str"),
        ("mood: fine", "mood is 'fine', expected"),
        ("income: lots", "income is 'lots', expected float"),
        ("range: [1]", "range is .1., expected 2 values"),
        ("pet: {indoor: 1}", "pet.indoor is 1, expected bool"),
        ("pet: 5", "pet is 5, expected one of cat, dog"),
        ("- a list", "expected `key: value` lines"),
        ("a: [", "a.yaml, line 1: not valid YAML"),
    ],
)
def test_bad_files_are_one_line(file, text, message):
    with pytest.raises(UserError, match=message) as error:
        run(file=file(text))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the configuration .*nothing.yaml: No such file"):
        run(file=tmp_path / "nothing.yaml")


def test_help_exits_with_success(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help-all")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--pet cat|dog" in shown and "--other.height X" in shown and "In metres [2.5]" in shown


def test_help_tells_the_defaults_of_the_files(file, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help-all", file=file("name: Jones\npet: {name: dog, tricks: [sit]}", "b.yaml"))
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "[Smith; b Jones]" in shown and "b sit]" in shown


def test_one_of_three_options(file):
    @dataclass(frozen=True)
    class Options:
        steps: int | None = None
        """Steps."""
        epochs: float | None = None
        """Epochs."""
        samples: int | None = None
        """Samples."""

    def one(args, file=None):
        group = ("steps", "epochs", "samples")
        config = parse(Options, args, file, prog="t", description="", either=(group,))
        return config.steps, config.epochs, config.samples

    by_epochs = file("epochs: 2.0")
    assert one(["--samples", "9"], by_epochs) == (None, None, 9)
    assert one([], by_epochs) == (None, 2.0, None)
    with pytest.raises(UserError, match="give --epochs or --samples, not both"):
        one(["--samples", "9", "--epochs", "1"])
    with pytest.raises(UserError, match="give --steps or --epochs or --samples, not all"):
        one(["--samples=9", "--epochs", "1", "--steps", "3"])
    with pytest.raises(UserError, match="c.yaml: give epochs or samples, not both"):
        one([], file("samples: 1\nepochs: 2.0", "c.yaml"))


def test_either_of_two_options(file):
    @dataclass(frozen=True)
    class Options:
        steps: int | None = None
        """Steps."""
        epochs: float | None = None
        """Epochs."""

    def both(args, file=None):
        config = parse(Options, args, file, prog="t", description="", either=(("steps", "epochs"),))
        return config.steps, config.epochs

    by_epochs = file("epochs: 2.0")
    assert both(["--steps", "3"], by_epochs) == (3, None)
    assert both(["--epochs", "1"], by_epochs) == (None, 1.0)
    assert both([], by_epochs) == (None, 2.0)
    with pytest.raises(UserError, match="not both"):
        both(["--steps", "3", "--epochs", "1"])
    with pytest.raises(UserError, match="c.yaml: give steps or epochs, not both"):
        both([], file("steps: 1\nepochs: 2.0", "c.yaml"))


def test_hyphens_are_underscores_in_what_is_said_of_a_stray_value_too():
    @dataclass(frozen=True)
    class Options:
        run_folder: str = ""
        """Folder."""
        dry_run: bool = False
        """Whether."""

    for args, told in (
        (
            ["--run-folder", "a", "b"],
            "--run-folder takes one value, not also 'b'; quote a pattern, .*: --run-folder 's",
        ),
        (["--dry-run=yes"], "--dry-run is a switch and takes no value, not 'yes'"),
    ):
        with pytest.raises(UserError, match=told):
            parse(Options, args, prog="t", description="")


def test_a_pattern_that_the_shell_expanded_is_told_without_a_flag_too():
    @dataclass(frozen=True)
    class Options:
        spec: Annotated[Positional[str], arg(metavar="SPEC")]
        """Shards."""

    with pytest.raises(UserError, match="this takes one value, not also '1.tar'; quote a pattern"):
        parse(Options, ["0.tar", "1.tar", "2.tar"], prog="t", description="")


def test_only_one_value_stands_behind_an_equals_sign():
    @dataclass(frozen=True, kw_only=True)
    class Options:
        images: Positional[tuple[str, ...]]
        """Images."""
        text: tuple[str, ...] = ()
        """Texts."""

    for args in (["--text=a dog", "0.jpg", "1.jpg"], ["0.jpg", "--text=a dog", "1.jpg"]):
        read = parse(Options, args, prog="t", description="")
        assert (read.images, read.text) == (("0.jpg", "1.jpg"), ("a dog",))
    read = parse(Options, ["0.jpg", "--text=a", "--text", "b", "c"], prog="t", description="")
    assert (read.images, read.text) == (("0.jpg",), ("a", "b", "c"))


def test_words_that_stand_alone_may_stand_between_flags():
    @dataclass(frozen=True, kw_only=True)
    class Options:
        model: Positional[str]
        """A model."""
        images: Positional[tuple[str, ...]]
        """Images."""
        limit: int | None = None
        """How many."""
        query: tuple[int, int] | None = None
        """Row and column."""
        json: bool = False
        """As JSON."""

    words = ["--json", "m", "--limit", "3", "a", "--query", "-1", "2", "b", "--no_json", "c"]
    read = parse(Options, words, prog="t", description="")
    assert (read.model, read.images, read.limit, read.query) == ("m", ("a", "b", "c"), 3, (-1, 2))


def test_take_option():
    assert take_option(["--a", "1", "--config", "x.yaml"], "config") == (["--a", "1"], "x.yaml")
    assert take_option(["--config=x.yaml"], "config") == ([], "x.yaml")
    assert take_option(["--a"], "config") == (["--a"], None)
    with pytest.raises(UserError, match="--config needs a value"):
        take_option(["--config"], "config")
