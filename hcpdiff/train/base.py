"""The base model of a run: found and checked before anything large is read, then loaded, with marks by which a resumed run knows it again."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..config.build import build
from ..config.schema import DatasetConfig, ModelConfig, TrainConfig
from ..diffusion.objective import PREDICTIONS, DiscreteObjective
from ..errors import ConfigError
from ..families import detect
from ..families.base import TEXT, Models, denoiser_of
from ..families.place import open_place
from ..families.source import resolve
from ..quantized import Plan
from .vae_mark import VaeMark

NO_SIGNAL = 1e-6  # alphas_cumprod of a last step that holds noise alone; of SD's usual schedule it is 0.0047

LAYER = re.compile(r"\blayers\.([0-9]+)\.")  # of a transformer, in the path of a module


class BaseModel:
    """`place`, `family`, `geometry` (pixels per latent cell and side, latent channels) and `notices` are known from the start, the rest after `load`."""

    def __init__(self, config: ModelConfig):
        """ConfigError where it is not there, not whole, or of no family that is known."""
        self.config = config
        path, notices = resolve(config.pretrained_model_name_or_path, config.revision, config.variant)
        self.place = open_place(path, config.config, None if config.prediction_type == "auto" else config.prediction_type)
        self.family = detect(self.place)
        self.family.check(self.place, vae=config.vae)
        self.notices = [*notices, *self.place.notices]
        self.geometry = self.family.latent_geometry(self.place)
        self.models: Models | None = None
        self._marks: dict[str, str] = {}
        self._vae: VaeMark | None = None

    def load(self, dtype: torch.dtype, allow: Sequence[str], cache: Path | None = None) -> Models:
        """Reads every part, of the denoiser the outline (`Models.read` gets its weights), and so of the VAE where its mark is remembered beside the latents in `cache`."""
        def seen(part: str, models: Models) -> None:
            if part == "vae":
                self._vae = VaeMark(models, cache)

        outlines = [denoiser_of(self.family).name, "vae"]
        self.models = self.family.load(self.place, self._name(), None, dtype, self.config.vae, self.config.variant, outlines=outlines, seen=seen)
        self._set_scheduler(allow)
        self._marks = {component.name: self.place.mark(component.name) for component in self.family.components}
        self.place.release()  # the denoiser is read when all that is encoded has been
        return self.models

    @property
    def marks(self) -> dict[str, str]:
        """Part -> digest of its weights, of a loaded model."""
        return self._marks | {"vae": self._vae.digest}

    def remember_marks(self) -> None:
        """For the next start, once there are cached latents."""
        self._vae.remember()

    def read(self, name: str, device: torch.device) -> None:
        """Puts a part on the device; the denoiser's weights are read now, one by one, and kept in few bits where the config says so."""
        part = self.models.modules[name]
        keep = self.quantization.keeper(part) if self.quantization and name == denoiser_of(self.family).name else None
        self.models.read(name, device, keep)
        self.place.release()

    @property
    def quantization(self) -> Plan | None:
        """How the denoiser's weights are kept in few bits, where the config says so."""
        return Plan(self.config.quantize, self.family.dense) if self.config.quantize else None

    def _name(self) -> str:
        """What files call it: no local path."""
        source = self.config.pretrained_model_name_or_path
        return self.place.path.resolve().name if Path(source).exists() else source

    def _set_scheduler(self, allow: Sequence[str]) -> None:
        if self.config.noise_scheduler:
            scheduler = build(self.config.noise_scheduler, "noise_scheduler", "model.noise_scheduler", allow)
            if not hasattr(scheduler, "alphas_cumprod"):
                raise ConfigError(f"model.noise_scheduler: {type(scheduler).__name__} is for another kind of model; a DDPM-like scheduler (with alphas_cumprod) is needed.")
            self.models.scheduler_config = dict(scheduler.config)
        if self.config.prediction_type != "auto":
            self.models.scheduler_config = {**self.models.scheduler_config, "prediction_type": self.config.prediction_type}

    @property
    def prediction(self) -> str:
        """What the model predicts: epsilon, v_prediction, sample."""
        return self.models.scheduler_config.get("prediction_type", "epsilon")

    def learns(self) -> dict[str, str]:
        """What is learnt, as a resumed run knows it again: what is predicted, and a digest of the noise schedule, which a changed config alone can make another."""
        alphas = self.family.alphas_cumprod(self.models)
        return {"prediction": self.prediction, "schedule": hashlib.sha256(alphas.numpy().tobytes()).hexdigest()[:12]}

    def objective(self, train: TrainConfig) -> DiscreteObjective:
        """What is learnt; ConfigError where the model predicts something unknown, or has fewer timesteps than asked for."""
        alphas = self.family.alphas_cumprod(self.models)
        if self.prediction not in PREDICTIONS:
            raise ConfigError(f"the base model's scheduler predicts {self.prediction!r}; supported: {', '.join(PREDICTIONS)}.")
        top = train.max_timestep or len(alphas)
        if not train.min_timestep < top <= len(alphas):
            raise ConfigError(f"train.min_timestep = {train.min_timestep}, train.max_timestep = {train.max_timestep}: 0 <= min < max <= {len(alphas)} must hold.")
        if self.prediction == "epsilon" and alphas[-1] <= NO_SIGNAL:
            raise ConfigError("the noise schedule ends without signal (rescale_betas_zero_snr: zero terminal SNR), but the model is to predict epsilon: at the last step noise is "
                              "all there is, so nothing is learnt from it. Set model.prediction_type=v_prediction if the model was made for it, or give "
                              "model.noise_scheduler a schedule without rescale_betas_zero_snr.")
        return DiscreteObjective(alphas, self.prediction, train.min_timestep, top)

    def size_notes(self, data: Mapping[str, DatasetConfig]) -> list[str]:
        """Lines on datasets that are trained at far less pixels than the model was made for, as happens to those who come from smaller models."""
        own = self.family.own_area(self.place)
        return [f"data.{name}.bucket.target_area = {part.bucket.target_area}: this model was made for about {own} pixels ({round(own**0.5)} x {round(own**0.5)}); "
                f"target_area: {own} trains it at its own size." for name, part in data.items() if not part.bucket.sizes and 2 * part.bucket.target_area < own]

    def check_clip_skip(self) -> None:
        """ConfigError where more layers are to be left out than there are."""
        most = self.family.most_clip_skip(self.models)
        if self.config.clip_skip > most:
            raise ConfigError(f"model.clip_skip = {self.config.clip_skip}: of this text encoder at most {most} layers can be skipped.")

    def unread_layers(self, trainables: Sequence) -> list[str]:
        """Notices of LoRA layers in a text encoder beyond the last layer that is read: their gradients are zero."""
        notices = []
        for trainable in trainables:
            if trainable.component.role != TEXT:
                continue
            read = self.family.text_layers_read(self.models, trainable.component.name, self.config.clip_skip)
            places = {path: LAYER.search(path) for path in trainable.adapters}
            dead = [path for path, place in places.items() if place and int(place[1]) >= read]
            if dead:
                notices.append(f"note: {len(dead)} of {len(places)} LoRA layers of the {trainable.component.name} learn nothing: only its first {read} layers are read "
                               f"(model.clip_skip = {self.config.clip_skip}), and they lie beyond, such as {dead[0]}.")
        return notices

    def checkpoint_gradients(self, trained: Sequence[str]) -> None:
        """Activations are computed again in the backward pass, of every part that it goes through: the denoiser always, and what is trained."""
        for name in dict.fromkeys([denoiser_of(self.family).name, *trained]):
            self.family.checkpointing(self.models, name)
            self.models.modules[name].train()  # the libraries recompute in train mode only; SD has no dropout of its own
