"""Every random draw is a function of its position: (seed, purpose, where) -> a generator of its own.

Nothing here keeps state, so a resumed run, another number of loader workers or another world size
draws the same numbers. Philox (Salmon et al., SC'11) takes a 128-bit key, which is a BLAKE2b hash of the position;
torch's CPU generator would use only 32 bits of a seed.
"""

import hashlib

import numpy as np


def position_key(seed: int, purpose: str, *where: int | str) -> int:
    """128-bit key of a position; any two different positions get unrelated keys."""
    text = "\x1f".join([str(seed), purpose, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *where: int | str) -> np.random.Generator:
    """numpy generator for one purpose at one position, e.g. `generator(seed, 'noise', epoch, sample)`."""
    return np.random.Generator(np.random.Philox(key=position_key(seed, purpose, *where)))
