"""`tblog/` in the run folder, for TensorBoard."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from .base import Logger, below, checked_name


class TensorBoardLogger(Logger):
    """Scalars of every step and preview pictures; a resumed run hides what an interrupted one logged beyond its state."""

    def __init__(self, folder: str = "tblog"):
        self.folder, self.writer = checked_name(folder, "folder"), None

    def open(self, folder: Path, first_step: int, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with _nameless():
            self.writer = SummaryWriter(below(folder, self.folder), purge_step=first_step + 1 if first_step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, tag: str, images: Sequence) -> None:
        import numpy as np

        for index, image in enumerate(images):
            self.writer.add_image(f"{tag}/{index}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


@contextmanager
def _nameless():
    """TensorBoard puts the machine's name into its file's name; a run folder is often handed on, so inside it is `run`."""
    from tensorboard.summary.writer import event_file_writer

    socket = event_file_writer.socket
    event_file_writer.socket = SimpleNamespace(gethostname=lambda: "run")
    try:
        yield
    finally:
        event_file_writer.socket = socket
