"""Named choices: losses, optimizers, sources. Adding one is one registration."""

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
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

    Args:
        places: of components whose module is imported when one asks for them: 'package.module:Class' by name.
    """

    def __init__(self, kind: str, places: Mapping[str, str] | None = None):
        self.kind = kind
        self._entries: dict[str, T | str] = dict(places or {})

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
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = resolve_name(entry)
        return entry

    def name_of(self, entry: T) -> str:
        """Return the name under which `entry` is stored."""
        return next(name for name in self._entries if self.get(name) is entry)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)
