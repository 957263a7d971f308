"""Token sequences as a tree, so that what several begin with is run once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A stretch of tokens that follows another node's (or begins, if ``parent`` is None).

    Attributes:
        parent: place of the node before it.
        start: number of tokens before it.
        ids: its tokens.
    """

    parent: int | None
    start: int
    ids: Ids


@dataclass(frozen=True)
class TokenTree:
    """A tree of token sequences.

    Attributes:
        nodes: parents before their children.
        leaves: for each sequence the place of a node whose path begins with it. The sequence ends with it if that was
            asked for; otherwise a longer one may go on there.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Ids], ending: Sequence[bool], worth: int) -> "TokenTree":
        """The tree of different sequences.

        Args:
            sequences: none of them empty, none twice.
            ending: of which a node must end where the sequence does.
            worth: how many tokens a shared node must spare.
        """
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        # What another one goes on from needs no node of its own: sorted, that one follows.
        needed = [
            i
            for i, after in zip_longest(order, order[1:])
            if ending[i] or after is None or sequences[after][: len(sequences[i])] != sequences[i]
        ]
        rows = [sequences[i] for i in needed]
        nodes: list[Node] = []
        leaves = [-1] * len(rows)

        def add(parent: int | None, start: int, ids: Ids) -> int:
            nodes.append(Node(parent, start, ids))
            return len(nodes) - 1

        # Rows that agree up to `known`; the node before them ends at `start`.
        open_groups: list[tuple[range, int | None, int, int]] = [(range(len(rows)), None, 0, 0)]
        while open_groups:
            group, parent, start, known = open_groups.pop()
            for part in _by_token(rows, group, known):
                first = rows[part[0]]
                if len(part) == 1:
                    leaves[part[0]] = add(parent, start, first[start:])
                    continue
                # Rows are sorted: what the first and the last share, all do.
                stop = _shared(first, rows[part[-1]])
                ends = len(first) == stop
                node = parent, start
                if ends or (len(part) - 1) * (stop - start) >= worth:
                    node = add(parent, start, first[start:stop]), stop
                    if ends:
                        leaves[part[0]] = node[0]
                open_groups.append((part[1:] if ends else part, *node, stop))
        found, leaf = dict(zip(needed, leaves, strict=True)), -1
        for i in reversed(order):
            leaf = found.setdefault(i, leaf)
        return cls(tuple(nodes), tuple(found[i] for i in range(len(sequences))))

    def path(self, place: int) -> Iterator[int]:
        """A node and those before it, backwards."""
        step: int | None = place
        while step is not None:
            yield step
            step = self.nodes[step].parent

    def holding(self, leaf: int, position: int) -> int:
        """The node on the way to ``leaf`` that has the token at ``position``."""
        return next(place for place in self.path(leaf) if self.nodes[place].start <= position)


def _by_token(rows: Sequence[Ids], group: range, position: int) -> Iterator[range]:
    """Parts of a group of sorted rows that have the same token at a position."""
    for _, part in groupby(group, lambda i: rows[i][position]):
        places = list(part)
        yield range(places[0], places[-1] + 1)


def _shared(a: Ids, b: Ids) -> int:
    """Number of tokens at the beginning of both."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
