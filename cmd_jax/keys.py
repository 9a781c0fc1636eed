"""Random keys by name: below the one key of a run, everything that is drawn has its own.

In JAX `split(key)[i]` is `fold_in(key, i)`: keys made by numbers that mean different things meet, as the second half of
a key and its step 1. So each branch has a name, whose number no index reaches; and a key is either drawn from or
derived from, never both, since a draw takes the same blocks.
"""

import jax

# Of what a seed gives: where a key comes from, who draws from it, and the order of the clips. Raise it with a change.
VERSION = 1

# Append only: the place of a name is its number, and decides what a seed gives.
NAMES = (
    "parameters",  # their initial values; then by module
    "autoencoder",
    "2d",
    "3d",
    "step",  # of training, by number
    "microbatch",  # of a step, by number
    "frame",  # which one of a clip is judged
    "timestep",
    "noise",  # what is added to data, or sampling starts from
    "label",  # whether it is dropped
    "preview",  # by the number of the step
    "sample",  # by its index in a request, or its row in a preview
    "content",  # of a sample
    "motion",  # of a sample, by variant
    "solver",  # noise that a step of sampling adds, by number
    "validation",  # by the number of the batch
)
FIRST = 2**31  # number of the first name; indices lie below


def derive(key, name: str, *indices):
    """The key of `name`, one of NAMES, below `key`, and of the indices in 0..2^31-1 below that."""
    for number in (FIRST + NAMES.index(name), *indices):
        key = jax.random.fold_in(key, number)
    return key
