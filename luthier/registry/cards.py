"""What a technique is to the registry: its function, the facts on its card, and the part that a recipe makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class Card:
    """The facts about a technique. They stand on its function and nowhere else."""

    title: str
    paper: str = ""
    """arXiv number or other source, checked by the technique's author."""
    row: int | None = None
    """Its number in `luthier/registry/papers.tsv`; None for parts that no paper of the list is about."""
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()
    reduces_to: str = ""
    """The setting under which it becomes something simpler; a test executes it."""
    departs: str = ""
    """Where and why it differs from the paper or the authors' code."""
    step0: str = "base exactly"
    """base exactly | base up to rounding | on purpose not the base."""
    merges: str = "exactly"
    """exactly | as another form | never | is in place."""
    replication: str = ""
    """The lab experiment that tests the paper's claim."""
    learning_rate: float | None = None
    """What a recipe gets that names none, for techniques that decide which numbers train."""
    key: str = ""
    """The key of a recipe under which people look for it, where its kind goes under another one."""
    name: str = ""
    kind: str = ""
    summary: str = ""

    def as_json(self) -> dict[str, Any]:
        """The card as plain data; sets become sorted lists."""
        return {key: sorted(value) if isinstance(value, frozenset) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Technique:
    """A technique that was looked up."""

    name: str
    kind: str
    factory: Callable[..., Any]
    card: Card


@dataclass(frozen=True)
class Part:
    """A technique with its options, ready to use: what a recipe's `{name: {option: value}}` becomes."""

    name: str
    kind: str
    options: Mapping[str, Any]
    values: tuple[Any, ...]
    card: Card = field(default_factory=lambda: Card(title=""))


def method(*, title: str, needs: Iterable[str] = (), gives: Iterable[str] = (), **facts: Any) -> Callable[[Factory], Factory]:
    """Put a card on a technique's function. The fields are those of `Card`."""

    def put(factory: Factory) -> Factory:
        for parameter in inspect.signature(factory).parameters.values():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                raise TypeError(f"{factory.__name__}: options are keyword-only, `{parameter.name}` is not")
        summary = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
        card = Card(title=title, needs=frozenset(needs), gives=frozenset(gives), summary=summary, **facts)
        factory.card = card  # type: ignore[attr-defined]
        return factory

    return put


def slots(parts: Sequence[Part]) -> list[tuple[str, Part]]:
    """Every part with a name of its own: techniques used twice are numbered."""
    seen: dict[str, int] = {}
    named = []
    for part in parts:
        seen[part.name] = seen.get(part.name, 0) + 1
        named.append((part.name if seen[part.name] == 1 else f"{part.name}.{seen[part.name]}", part))
    return named


def slots_of(chosen: Mapping[str, Sequence[Part]]) -> list[tuple[str, str, Part]]:
    """Every part of a run with its key and a name of its own, in the order of the keys."""
    keys = [key for key, parts in chosen.items() for _ in parts]
    named = slots([part for parts in chosen.values() for part in parts])
    return [(key, slot, part) for key, (slot, part) in zip(keys, named, strict=True)]


def values_of(chosen: Mapping[str, Sequence[Part]], *kinds: type) -> list[tuple[str, Any]]:
    """All values of some kinds among a run's parts, by slot, in the order of the parts, whatever key they stand under."""
    return [(slot, value) for _, slot, part in slots_of(chosen) for value in part.values if isinstance(value, kinds or object)]
