"""The import of the large libraries, made short."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For the imports of a command: about 400,000 objects that stay until it ends.

    The collector of cycles would look at all that there are again and again while they come, and once more whenever memory is let go later; it rests
    meanwhile, and passes over them from then on (`gc.freeze`). Where torch is imported already there is nothing to do, and objects of others are left alone.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
