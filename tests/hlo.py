"""Compiled programs as text: what one device multiplies in them, and what the devices send one another."""

import re
from collections import Counter

from cmd_jax.performance.hlo import COLLECTIVES

SHAPED = r"= \w+\[([\d,]*)\](?:\{[^}]*\})? "


def collectives(text: str) -> Counter:
    """{name: how often it stands there}; what is in a loop counts once."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))


def products(text: str) -> Counter:
    """{(convolution or dot, sizes of the result in rising order): how often it stands there}, of one device.

    Sorted, since XLA may transpose both sides of a product.
    """
    found = re.findall(SHAPED + r"(convolution|dot)\(", text)
    return Counter((name, tuple(sorted(map(int, shape.split(","))))) for shape, name in found)


def convolved_rows(text: str) -> set[int]:
    """Pictures that one device takes at once, over all convolutions of a program without gradients."""
    found = re.findall(SHAPED + r"convolution\(.*dim_labels=\w+->(\w+)", text)
    return {int(shape.split(",")[labels.index("b")]) for shape, labels in found}
