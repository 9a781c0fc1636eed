"""Work that no mesh shall take part in."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def apart(function: Callable, *arguments):
    """function(*arguments) in a thread of its own, where no mesh is set: under one, JAX runs whatever is not told
    otherwise on all of its devices, of other processes too, or of a topology that nobody has."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()
