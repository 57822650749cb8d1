"""Few of many combinations of choices, in which any two choices that can be made together are made together."""

from collections.abc import Hashable, Mapping, Sequence


def few(combinations: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Numbers of a few of these, each a choice for every name; of two that add as many pairs the first is taken."""
    pairs = [{(a, x, b, y) for a, x in c.items() for b, y in c.items() if a <= b} for c in combinations]
    chosen, missing = [], set().union(*pairs)
    while missing:
        chosen.append(max(range(len(pairs)), key=lambda i: len(pairs[i] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen
