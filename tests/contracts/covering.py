"""Covering arrays: few combinations in which everything that must meet meets, made greedily and always the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def covering(
    items: Sequence[Item],
    pairs: Iterable[tuple[Item, Item]],
    *,
    groups: Mapping[Item, Hashable] | None = None,
    room: Callable[[Sequence[Item], Item], bool] = lambda chosen, one: True,
) -> list[tuple[Item, ...]]:
    """Combinations of items in which every pair that must meet meets at least once.

    Args:
        items: what can be combined, in the order that decides between equals.
        pairs: which two must meet; a pair that has no room together meets nowhere.
        groups: every item must also meet one of every other group; none: only pairs count.
        room: whether another item may join those that are chosen.

    Returns:
        Combinations, each in the order of `items`. Their number grows with that of the pairs over that of the pairs in a
        combination, and with the number of items for the groups.
    """
    place = {item: i for i, item in enumerate(items)}
    names = sorted(set(groups.values()), key=str) if groups else []
    group_of = [names.index(groups[item]) if groups else 0 for item in items]
    # Bits: which items, and which groups, each item still has to meet.
    meets = [0] * len(items)
    for one, other in pairs:
        if room((one,), other):
            meets[place[one]] |= 1 << place[other]
            meets[place[other]] |= 1 << place[one]
    kinds = [0] * len(items)
    if groups:
        for i, item in enumerate(items):
            for j, other in enumerate(items):
                if group_of[i] != group_of[j] and room((item,), other):
                    kinds[i] |= 1 << group_of[j]
    used = [0] * len(items)
    found: list[tuple[Item, ...]] = []

    def gain(i: int, chosen: list[int], members: int, grouped: int) -> int:
        new = (meets[i] & members).bit_count() + (kinds[i] & grouped).bit_count()
        return new + sum(kinds[j] >> group_of[i] & 1 for j in chosen)

    while True:
        first = max(range(len(items)), key=lambda i: (meets[i].bit_count() + kinds[i].bit_count(), -i))
        if not meets[first] and not kinds[first]:
            return found
        chosen, members, grouped = [first], 1 << first, 1 << group_of[first]
        while True:
            fits = [i for i in range(len(items)) if not members >> i & 1 and room([items[j] for j in chosen], items[i])]
            best = max(fits, key=lambda i: (gain(i, chosen, members, grouped), -used[i], -i), default=None)
            if best is None or not gain(best, chosen, members, grouped):
                break
            chosen.append(best)
            members |= 1 << best
            grouped |= 1 << group_of[best]
        assert len(chosen) > 1, f"nothing has room beside {items[first]}"
        for i in chosen:
            meets[i] &= ~members
            kinds[i] &= ~grouped
            used[i] += 1
        found.append(tuple(items[i] for i in sorted(chosen)))


def uncovered(combinations: Iterable[Sequence[Item]], pairs: Iterable[tuple[Item, Item]]) -> list[tuple[Item, Item]]:
    """The pairs that meet in none of the combinations."""
    together = {frozenset((one, other)) for chosen in combinations for one in chosen for other in chosen}
    return [pair for pair in pairs if frozenset(pair) not in together]
