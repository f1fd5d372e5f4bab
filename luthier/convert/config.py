"""A configuration of another tool, read key by key: each with its type, and none forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from luthier.errors import LuthierError, cut_short
from luthier.recipe.reading import with_numbers

UNSET: tuple[object, ...] = (None, "", [], {})
"""What other tools write behind a key that is not used."""


class Config:
    """The keys of a configuration, of which it remembers those that were asked for.

    Args:
        data: what the file holds.
        where: the file, for errors.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = {str(key): with_numbers(value) for key, value in data.items()}
        self.where = where
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether a key is set, asked for or not."""
        return self.data.get(name) not in UNSET

    def take(self, *names: str) -> Any:
        """What the first of some keys holds that is set; None where none is. The others stay to be asked for."""
        for name in names:
            if self.has(name):
                self._taken.add(name)
                return self.data[name]
        return None

    def flag(self, *names: str) -> bool | None:
        """True or false.

        Raises:
            LuthierError: it is neither.
        """
        value = self.take(*names)
        if value is None or isinstance(value, bool):
            return value
        self._refuse(names, value, "true or false")

    def number(self, *names: str) -> float | None:
        """A number.

        Raises:
            LuthierError: it is none.
        """
        value = self.take(*names)
        try:
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                return value
            if isinstance(value, str):
                return float(value)
        except ValueError:
            pass
        self._refuse(names, value, "a number")

    def whole(self, *names: str) -> int | None:
        """A whole number.

        Raises:
            LuthierError: it is none.
        """
        value = self.number(*names)
        if value is None or float(value).is_integer():
            return None if value is None else int(value)
        self._refuse(names, value, "a whole number")

    def text(self, *names: str) -> str | None:
        """Text.

        Raises:
            LuthierError: it is none.
        """
        value = self.take(*names)
        if value is None or isinstance(value, str):
            return value
        self._refuse(names, value, "text")

    def choice(self, *names: str) -> str | None:
        """Text, where YAML reads the word `no` as false.

        Raises:
            LuthierError: it is something else.
        """
        value = self.take(*names)
        return "no" if value is False else value if value is None or isinstance(value, str) else self._refuse(names, value, "text")

    def names(self, *names: str) -> list[str] | None:
        """Several names: a list, or text with commas between them.

        Raises:
            LuthierError: it is neither.
        """
        value = self.take(*names)
        if value is None:
            return None
        several = value.split(",") if isinstance(value, str) else value
        if isinstance(several, list) and all(isinstance(one, str) for one in several):
            return [one.strip() for one in several if one.strip()]
        self._refuse(names, value, "names")

    def parts(self, name: str) -> list[Mapping[str, Any]] | None:
        """Several mappings.

        Raises:
            LuthierError: it is something else.
        """
        value = self.take(name)
        several = [value] if isinstance(value, Mapping) else value
        if value is None or (isinstance(several, list) and all(isinstance(one, Mapping) for one in several)):
            return several
        self._refuse((name,), value, "a list of mappings")

    def rest(self) -> dict[str, Any]:
        """The keys that are set and that nobody asked for."""
        return {key: value for key, value in self.data.items() if self.has(key) and key not in self._taken}

    def _refuse(self, names: tuple[str, ...], value: Any, what: str) -> NoReturn:
        name = next(one for one in names if one in self._taken)
        raise LuthierError(
            f"`{name}` is {cut_short(repr(value), 60)}, where {what} belongs", where=f"{self.where}: {name}", fix="correct the file"
        )


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is, and anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}
