"""The contract of a model family: everything that is true of it and of no other, behind functions without state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .place import Place
from .read_parts import Keep, Reader

DENOISER, TEXT = "denoiser", "text"  # roles of a component


@dataclass(frozen=True)
class Component:
    """A part that can be trained: its attribute name, its config key, the stem of its files, its prefix in a webui file, its role.

    Several parts may share a config key; `alias` is then what a pattern begins with that is for this one alone.
    """

    name: str
    config_key: str
    file_stem: str
    webui_prefix: str
    role: str = DENOISER
    alias: str = ""


@dataclass
class Models:
    """A loaded base model. `modules` holds what was asked for: unet, text_encoder, vae ...; `tokenizers` are in the order of the text encoders."""

    family: Family
    folder: Path
    name: str
    modules: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler_config: Mapping[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, Reader] = field(default_factory=dict)  # parts whose weights are still to be read, and what reads them

    @property
    def unet(self) -> nn.Module:
        """The denoiser."""
        return self.modules["unet"]

    @property
    def text_encoder(self) -> nn.Module:
        """The (first) text encoder."""
        return self.modules["text_encoder"]

    @property
    def tokenizer(self) -> Any:
        """The (first) tokenizer."""
        return self.tokenizers["tokenizer"]

    @property
    def vae(self) -> nn.Module:
        """The image autoencoder."""
        return self.modules["vae"]

    def drop(self, *names: str) -> None:
        """Lets parts go, so that their memory is free."""
        for name in names:
            self.modules.pop(name, None)
            self.unread.pop(name, None)

    def read(self, name: str, device: torch.device, keep: Keep | None = None) -> None:
        """Puts a part on `device`; of an outline it reads the weights, one by one, and keeps of each what `keep` makes of it."""
        module = self.modules[name]
        if name in self.unread:
            self.unread.pop(name)(module, device, keep)
        module.to(device)

    def weights_of(self, name: str) -> Path | None:
        """The file that all weights of a part are still to be read from, if they lie in one."""
        return self.unread[name].file if name in self.unread else None


@dataclass(frozen=True)
class Tokens:
    """Token ids of prompts: per tokenizer (B, R, 77) int64, R chunks of BOS + 75 + EOS; `cut` counts what did not fit, per prompt."""

    ids: tuple[Tensor, ...]
    cut: tuple[int, ...]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: hidden (B, T, D), and pooled (B, P) where the family has it."""

    hidden: Tensor
    pooled: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of several; all of the same T."""
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return Conditioning(torch.cat([part.hidden for part in parts]), pooled)

    def to(self, *args, **kwargs) -> Conditioning:
        """As Tensor.to, for every tensor."""
        return Conditioning(self.hidden.to(*args, **kwargs), None if self.pooled is None else self.pooled.to(*args, **kwargs))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.hidden.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def clone(self) -> Conditioning:
        """With memory of its own: a row of a batch would hold all of it."""
        return Conditioning(self.hidden.clone(), None if self.pooled is None else self.pooled.clone())

    def select(self, index: slice | list[int]) -> Conditioning:
        """Some of the prompts, as a batch."""
        return Conditioning(self.hidden[index], None if self.pooled is None else self.pooled[index])


class Family(Protocol):
    """What the trainer, the visualizer and the converter ask of a model family. Stateless; state is in Models."""

    name: str
    pipeline: str
    components: tuple[Component, ...]
    dense: tuple[str, ...]  # layers of the denoiser that all it takes in and gives out goes through: they are never kept in few bits

    def load(self, folder: Path | Place, name: str, parts: Sequence[str] | None, dtype: torch.dtype, vae: str | None = None, variant: str | None = None,
             key: str = ..., outlines: Sequence[str] = (), seen: Callable[[str, Models], None] | None = None) -> Models:
        """Reads the named parts (None: all), frozen and in eval mode, on the CPU in `dtype` (the VAE in fp32); errors name `key`.

        outlines: parts of which everything but the weights' values is wanted now (`Models.read` gets these later). They are checked all the same.
        seen: called with each part's name and what there is so far, the part in it.
        """

    def check(self, folder: Path | Place, parts: Sequence[str] = ..., vae: str | None = None, key: str = ...) -> None:
        """ConfigError that names every missing file of the parts."""

    def latent_geometry(self, folder: Path | Place) -> tuple[int, int]:
        """(pixels per latent cell and side, latent channels) of a base model."""

    def own_area(self, folder: Path | Place) -> int:
        """Pixels of the pictures that a base model was made for."""

    def aliases(self, component: str, path: str) -> tuple[str, ...]:
        """The names under which a module of a component may be called in a pattern; path '' is the component itself."""

    def file_path(self, component: str, path: str) -> str:
        """A module path as files spell it."""

    def posterior(self, models: Models, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B,3,H,W) in [-1,1] -> mean, std (B,C,H/f,W/f) of the VAE's posterior, unscaled."""

    def scale_latent(self, models: Models, z: Tensor) -> Tensor:
        """VAE latents -> what the denoiser works on."""

    def tokenize(self, models: Models, prompts: Sequence[str], repeats: int) -> Tokens:
        """Prompts -> ids of `repeats` chunks each."""

    def count_tokens(self, models: Models, prompt: str) -> int:
        """Tokens of a prompt, without BOS and EOS."""

    def most_clip_skip(self, models: Models) -> int:
        """The largest clip_skip that the text encoders allow."""

    def text_layers_read(self, models: Models, component: str, clip_skip: int = 0) -> int:
        """How many of a text encoder's transformer layers its result depends on; what is trained beyond them learns nothing."""

    def encode_text(self, models: Models, tokens: Tokens, clip_skip: int = 0) -> Conditioning:
        """Token ids -> what the denoiser is conditioned on."""

    def denoise(self, models: Models, x_t: Tensor, t: Tensor, cond: Conditioning, extras: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction, in x_t's shape; `extras` holds (B,2) original_size, crop_top_left, target_size."""

    def alphas_cumprod(self, models: Models) -> Tensor:
        """(T,) float32, from the base model's scheduler config."""

    def vae_dtype(self, vae: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """What a VAE draws in where the rest of the model is in `dtype`."""

    def checkpointing(self, models: Models, component: str) -> None:
        """Turns gradient checkpointing on."""

    def regions(self, models: Models, component: str) -> list[nn.Module]:
        """The blocks that a component repeats, none inside another: what is compiled as a whole. Gradient checkpointing has its borders around, not inside them."""

    def base_version(self, models: Models) -> str:
        """What webui calls this base model, such as sd_v1."""


def component_of(family: Family, name: str) -> Component:
    """The family's component of that name."""
    return next(component for component in family.components if component.name == name)


def denoiser_of(family: Family) -> Component:
    """The component that denoises."""
    return next(component for component in family.components if component.role == DENOISER)


def text_components(family: Family) -> list[Component]:
    """The text encoders, in the order in which their outputs are laid side by side."""
    return [component for component in family.components if component.role == TEXT]


def form_of(module: nn.Module) -> bytes:
    """sha256 of all that a fingerprint has but the values: of an outline too."""
    digest = hashlib.sha256(_config_of(module))
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    return digest.digest()


def _config_of(module: nn.Module) -> bytes:
    config = {key: value for key, value in dict(getattr(module, "config", {})).items() if not key.startswith("_")}  # those are paths and versions
    return json.dumps(config, sort_keys=True, default=str).encode()


def fingerprint(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> str:
    """sha256 over the module's config, and names, shapes, dtypes and all values of its state (or of the one that it had): what makes it compute what it computes."""
    digest = hashlib.sha256(_config_of(module))
    for name, tensor in (module.state_dict() if state is None else state).items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().flatten().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
