"""Named choices: losses, optimizers, sources. Adding one is one registration."""

from collections.abc import Callable
from typing import Generic, TypeVar

from contrastive.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from a name to a component.

    Example:
        LOSSES = Registry("loss")

        @LOSSES.register("sigmoid")
        @dataclass(frozen=True)
        class SigmoidLossConfig: ...
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument under `name`. A name already taken is a ValueError."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered already")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called `name`; an unknown name is a UserError with a suggestion."""
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise UserError(f"unknown {self.kind} '{name}'.{did_you_mean(name, self._entries)} Known: {known}")
        return self._entries[name]

    def name_of(self, entry: T) -> str:
        """Return the name under which `entry` is stored."""
        return next(name for name, stored in self._entries.items() if stored is entry)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)
