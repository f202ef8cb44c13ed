"""ListOps: nested operations on lists of digits, drawn as for Long Range Arena.

Nangia 2018, arXiv 1804.06028; Tay 2021, arXiv 2011.04006.

    [MAX 2 9 [MIN 4 7 ] 0 ]  →  9

A node above the greatest depth is an operation with probability 1/4 and a digit otherwise; an operation has 2 to `max_args`
arguments, all drawn evenly. The parentheses of the benchmark's files, which its own tokenizer drops, are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from longspan.util.errors import SpecError

OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
WORDS = (*OPERATIONS, END, *map(str, range(10)))
"""The vocabulary of a text."""
OPERATION_SHARE = 0.25
PATIENCE = 1_000_000
"""Draws in a row without a new tree, after which drawing gives up."""


class Node(NamedTuple):
    """An operation, one of `OPERATIONS`, with its arguments."""

    operation: str
    arguments: tuple[Tree, ...]


Tree = int | Node
"""A digit, or an operation with its arguments."""


def value(tree: Tree) -> int:
    """The result of a tree, 0 to 9.

    MED of an even number of arguments is the mean of the middle two, rounded down; SM is the sum modulo 10.
    """
    if isinstance(tree, int):
        return tree
    found = sorted(map(value, tree.arguments))
    match tree.operation:
        case "[MIN":
            return found[0]
        case "[MAX":
            return found[-1]
        case "[MED":
            middle = len(found) // 2
            return found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) // 2
        case _:
            return sum(found) % 10


def words(tree: Tree) -> list[str]:
    """A tree as text, in words of `WORDS`."""
    if isinstance(tree, int):
        return [str(tree)]
    return [tree.operation, *(w for argument in tree.arguments for w in words(argument)), END]


def read(text: str) -> Tree:
    """The tree of a text with spaces between its words; parentheses are ignored.

    Raises `SpecError` for a text that is not one whole expression.
    """
    open_nodes: list[tuple[str, list[Tree]]] = [("", [])]
    for word in text.replace("(", " ").replace(")", " ").split():
        if word in OPERATIONS:
            open_nodes.append((word, []))
        elif word == END and len(open_nodes) > 1 and open_nodes[-1][1]:
            operation, arguments = open_nodes.pop()
            open_nodes[-1][1].append(Node(operation, tuple(arguments)))
        elif word in WORDS and word != END:
            open_nodes[-1][1].append(int(word))
        else:
            raise SpecError(f"{word!r} is not allowed there in a ListOps text; its words are {' '.join(WORDS)}")
    if len(open_nodes) != 1 or len(open_nodes[0][1]) != 1:
        raise SpecError(f"{text[:80]!r} is not one whole ListOps expression")
    return open_nodes[0][1][0]


@dataclass(frozen=True)
class Trees:
    """The distribution of trees; the defaults are the benchmark's.

    max_depth: counts the root as 1. min_length, max_length: only texts of more and of fewer words than these are drawn.
    Raises `SpecError` where no text fulfils both.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_args < 2:
            raise SpecError(f"max_depth and max_args must be at least 2, not {self.max_depth} and {self.max_args}")
        longest = (self.max_args ** (self.max_depth - 1) * (self.max_args + 1) - 2) // (self.max_args - 1)
        if not 0 <= self.min_length < min(self.max_length - 1, longest):
            raise SpecError(
                f"no text of this depth has more than {self.min_length} and less than {self.max_length} words; the longest "
                f"has {longest}"
            )

    def draw(self, seed: int) -> Iterator[Tree]:
        """Trees, none twice, determined by the seed; raises `SpecError` where no new ones are found."""
        rng, drawn, misses = random.Random(seed), set[Tree](), 0
        while misses < PATIENCE:
            tree, length = self._draw(rng, 1)
            misses += 1
            if self.min_length < length < self.max_length and tree not in drawn:
                drawn.add(tree)
                misses = 0
                yield tree
        raise SpecError(f"{PATIENCE:,} draws gave nothing new after {len(drawn):,} trees of {self}; allow more lengths")

    def _draw(self, rng: random.Random, depth: int) -> tuple[Tree, int]:
        """A tree and the number of its words."""
        if depth >= self.max_depth or rng.random() > OPERATION_SHARE:
            return rng.randrange(10), 1
        drawn = [self._draw(rng, depth + 1) for _ in range(rng.randint(2, self.max_args))]
        operation = rng.choice(OPERATIONS)
        return Node(operation, tuple(tree for tree, _ in drawn)), 2 + sum(length for _, length in drawn)
