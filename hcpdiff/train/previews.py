"""Preview pictures: each process draws its share of the prompts with the weights as they are, rank 0 writes them."""

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from ..config.schema import RunConfig
from ..errors import HCPError
from ..families.base import Models
from ..loggers import Logger
from .compiled import eagerly
from .hooks import Periodic
from .optim import weights_for_use
from .parallel import Parallel
from .signals import StopRequest
from .trainer import Trainer


def check_previews(models: Models, cfg: RunConfig) -> None:
    """ConfigError for prompts and sizes that cannot be drawn."""
    if cfg.preview.prompts:
        from ..vis.preview import check_preview

        check_preview(models, cfg.preview)


def encode_ahead(models: Models, cfg: RunConfig):
    """The preview's prompts as a frozen text encoder will say them every time; None without previews."""
    if not cfg.preview.prompts:
        return None
    from ..vis.preview import encode_preview_prompts

    return encode_preview_prompts(models, cfg.preview, cfg.model.clip_skip)


class Drawing:
    """Draws this process's share. `size`: (width, height) where the config names none. `prompts`: encoded ahead, where the text encoder stays as it is.
    A signal that asks to stop ends it with an HCPError."""

    def __init__(self, models: Models, cfg: RunConfig, size: tuple[int, int], prompts, parallel: Parallel, stop: StopRequest):
        self.models, self.cfg, self.size, self.prompts = models, cfg, size, prompts
        self.share, self.stop = (parallel.rank, parallel.world), stop

    def __call__(self) -> list:
        """The pictures; HCPError where there is no memory for them."""
        try:
            with eagerly(self.cfg.model.compile):
                return self._draw()
        except torch.OutOfMemoryError as error:
            preview, what = self.cfg.preview, (str(error).splitlines() or ["no memory"])[0]
            many = f"preview.bs = {preview.bs}, " if preview.bs > 1 else ""
            raise HCPError(f"out of memory ({what}). Lower {many}preview.width = {preview.width or self.size[0]} or "
                           f"preview.height = {preview.height or self.size[1]}.") from error

    def _draw(self) -> list:
        from ..vis.preview import draw_previews

        return draw_previews(self.models, self.models.family, self.cfg.preview, width=self.size[0], height=self.size[1], prompts=self.prompts, clip_skip=self.cfg.model.clip_skip,
                             share=self.share, between=self._give_up_on_a_signal)

    def _give_up_on_a_signal(self) -> None:
        if self.stop.signal:
            raise HCPError("a signal asks to stop")


class PreviewHook(Periodic):
    """Draws the preview prompts every `every` steps and at the end, into previews/ and the loggers. Each process draws its share, rank 0 writes."""

    def __init__(self, draw: Callable[[], list], run: Path, every: int, logger: Logger, parallel: Parallel):
        super().__init__(every)
        self.draw, self.run, self.logger, self.parallel = draw, run, logger, parallel

    def act(self, trainer: Trainer) -> bool:
        """Draws with the weights as they are. Also done where it cannot be drawn: the same weights would not do better a moment later."""
        step, drawn, fault, began = trainer.state.step, [], "", time.monotonic()
        try:
            with weights_for_use(trainer.optimizer):
                drawn = self.draw()
        except (HCPError, OSError) as error:  # a picture is no reason to lose a run
            fault = str(error)
        parts = self.parallel.gather((drawn, fault))
        if self.parallel.main:
            fault = next((fault for _, fault in parts if fault), "")
            images = [image for row in zip_longest(*(drawn for drawn, _ in parts)) for image in row if image is not None]
            self._show(step, images, fault or self._write(step, images), began)
        return True

    def _show(self, step: int, images: Sequence, fault: str, began: float) -> None:
        if fault:
            self.logger.say(f"warning: the preview of step {step} could not be drawn: {fault}")
        else:
            self.logger.say(f"previews of step {step}: {len(images)} picture{'s' if len(images) != 1 else ''} in {time.monotonic() - began:.1f} s")
            self.logger.images(step, "preview", images)

    def _write(self, step: int, images: Sequence) -> str:
        """Writes the pictures; what went wrong, or nothing."""
        try:
            folder = self.run / "previews"
            folder.mkdir(exist_ok=True)
            for index, image in enumerate(images):
                image.save(folder / f"{step}-{index}.png")
        except OSError as error:
            return str(error)
        return ""
