"""By what a VAE is known: a digest of its config and of all its weights, remembered beside the latents that rest on it."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..data.hashes import Content, HashMemo, Look
from ..families.base import Models, fingerprint, form_of
from ..families.read_parts import CPU

_MEMO = "vaes-1.bin"  # another number once a file's names or values are read as other ones, which the form does not tell


class VaeMark:
    """Of the VAE of `models`, whose weights are still to be read. Where its file is as it was when a run before made the digest, it stays unread: a start that
    encodes nothing has no need of a third of a gigabyte. Else it is read now, and a thread makes the digest while other parts are read."""

    def __init__(self, models: Models, folder: Path | None):
        """folder: of cached latents; None: nothing is remembered."""
        file = models.weights_of("vae")
        self._memo = HashMemo(folder / _MEMO) if folder and file else None
        self._file, self._form = file, form_of(models.vae)
        known = self._memo.digest(file, self._form) if self._memo else None
        if known:
            self._made: Future[str] = Future()
            self._made.set_result(known.hex())
            self._memo = None
            return
        before = Look(file) if self._memo else None
        models.read("vae", CPU)
        self._state = before.settled() if before else None
        pool = ThreadPoolExecutor(1, thread_name_prefix="hcpdiff-mark")
        self._made = pool.submit(fingerprint, models.vae, models.vae.state_dict())  # of now: it may be moved meanwhile
        pool.shutdown(wait=False)

    @property
    def digest(self) -> str:
        """64 hex digits; waits for them."""
        return self._made.result()

    def remember(self) -> None:
        """For the next start; once the folder is there. What cannot be written is made again."""
        if self._memo:
            self._memo.remember(self._file, Content(b"", bytes.fromhex(self.digest), self._state), self._form)
            self._memo.save()
            self._memo = None
