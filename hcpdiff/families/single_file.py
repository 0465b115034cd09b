"""A base model as one .safetensors (or .ckpt) file, as shared for webui and ComfyUI: `Place` over its header, with configs that need no network.

Everything here but `outline` and `tokenizer` works without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, HCPError, collect
from . import file_configs, file_kind
from .file_configs import TOKENIZER
from .file_kind import SD2, Kind, Shapes
from .source import MODEL_KEY, load_or_fault, read_json
from .weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    from torch import dtype as Dtype
    from torch import nn

    from .read_parts import Reader

PAD_ZERO = "!"  # token 0, with which open_clip's encoders were trained
NEEDED = ("unet", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class Keys:
    """How the command at hand calls what a message advises."""

    config: str
    prediction: str
    vae: str
    lora: str


def keys_for(key: str) -> Keys:
    """The keys beside that of the base model: the trainer's or the visualizer's."""
    if key.startswith("model."):
        return Keys("model.config", "model.prediction_type", "model.vae", "model.init_lora")
    return Keys("config", "prediction_type", "vae", "lora_path")


@dataclass(frozen=True)
class SingleFile:
    """One file that holds a whole model. configs: a folder of configs that is used instead of the released ones; prediction: what it predicts, as the user says."""

    path: Path
    configs: Path | None = None
    prediction: str | None = None
    key: str = MODEL_KEY
    weights: WeightFile = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "weights", open_weights(self.path))

    @property
    def shapes(self) -> Shapes:
        """name -> shape of every tensor."""
        return self.weights.shapes

    @cached_property
    def kind(self) -> Kind:
        """The kind of model; ConfigError that says what the file is instead."""
        keys = keys_for(self.key)
        kind = file_kind.kind_of(self.shapes, keys.vae, keys.lora)
        if isinstance(kind, str):
            raise ConfigError(f"{self.key} = {str(self.path)!r} is {kind}.")
        return kind

    @cached_property
    def _schedule(self) -> tuple[dict[str, Any], str]:
        """The scheduler config, and what it rests on; ConfigError where nothing tells what the model predicts."""
        if self.configs:
            return read_json(self.configs / "scheduler" / "scheduler_config.json"), f"as {self.configs} says"
        said = file_configs.said_prediction(self.shapes, self.weights.metadata)
        prediction, why = (self.prediction, f"as {keys_for(self.key).prediction} says") if self.prediction else said or (None, "")
        if prediction is None and self.kind is SD2:
            raise ConfigError(f"{self.key} = {str(self.path)!r} is a Stable Diffusion 2.x model, and nothing in it tells whether it predicts epsilon (as 2.0-base and 2.1-base do) or "
                              f"v (as the models for 768 pixels do). Say it: {keys_for(self.key).prediction}=v_prediction or {keys_for(self.key).prediction}=epsilon. "
                              f"With the wrong one pictures are noise.")
        zero = "ztsnr" in self.shapes
        return file_configs.schedule(self.kind, prediction or "epsilon", zero), (why or "as this kind does") + (", zero terminal SNR by its key ztsnr" if zero else "")

    @property
    def notices(self) -> Sequence[str]:
        """What the file was taken for, and what of it is not used."""
        config, why = self._schedule
        lines = [f"{self.path.name} is a {self.kind.title} model; it predicts {config.get('prediction_type', 'epsilon')}, {why}"]
        copies = sum(name.startswith("model_ema.") for name in self.shapes)
        return lines + ([f"{self.path.name}: {copies} weights of its averaged copy (EMA) are not used; the others are, as webui does"] if copies else [])

    def pipeline(self, key: str = MODEL_KEY) -> str:
        """The pipeline class of its kind."""
        return self.kind.pipeline

    def index(self, key: str = MODEL_KEY) -> dict[str, Any]:
        """That of the folder of configs, else as released."""
        own = self.configs and self.configs / "model_index.json"
        return read_json(own if own and own.is_file() else file_configs.released(self.kind) / "model_index.json")

    def parts(self) -> list[str]:
        """All parts of its kind."""
        return [*self.kind.layouts, "tokenizer", "scheduler"]

    def check(self, parts: Sequence[str], key: str = MODEL_KEY) -> None:
        """ConfigError that names parts that the file lacks, names that belong to nothing, and configs that cannot be found from it."""
        faults = self._strangers()
        collect(faults, *(lambda part=part: self._check_part(part, key) for part in parts if part in NEEDED), lambda: self._schedule)
        if faults:
            raise ConfigError(faults)

    def _check_part(self, part: str, key: str) -> None:
        if self._layout(part) is None:
            advice = {"vae": f" Name one in {keys_for(self.key).vae}."}.get(part, " A whole checkpoint is needed, not a pruned part of one.")
            raise ConfigError(f"{key} = {str(self.path)!r} holds no {part}: no name in it begins with {self.kind.layouts[part][0][0]}{advice}")
        self.config(part)

    def _strangers(self) -> list[str]:
        """Faults for the tensors that no part reads."""
        left = file_kind.unread(self.kind, self.shapes)
        twice = file_kind.spelt_otherwise(self.kind, left)
        faults = [file_kind.in_two_ways(f"{self.key} = {str(self.path)!r}", part, len(self.names(part)), self._layout(part)[0], others) for part, others in twice.items()]
        left = sorted(set(left).difference(*twice.values()))
        if left:
            faults.append(f"{self.key} = {str(self.path)!r}: {len(left)} of its tensors belong to no part of {self.kind.title}, such as {left[0]}. It is of another kind, or holds more "
                          f"than a model; nothing is left out unseen.")
        return faults

    def _layout(self, part: str) -> tuple[str, str] | None:
        return self.kind.layout(part, self.shapes)

    def names(self, part: str) -> dict[str, str]:
        """Name in the part -> name in the file, of every tensor that is the part's."""
        layout = self._layout(part)
        if layout is None:
            return {}
        return {name.removeprefix(layout[0]): name for name in self.shapes if name.startswith(layout[0]) and not file_kind.idle(name)}

    def has_config(self, part: str) -> bool:
        """Whether a config of the part can be found; faults of it are told by `check`."""
        try:
            self.config(part)
        except HCPError:
            return False
        return True

    def config(self, part: str) -> dict[str, Any]:
        """From the folder of configs, else as released, with widths and depths of the file."""
        if part == "scheduler":
            return dict(self._schedule[0])
        if self.configs:
            return read_json(self.configs / part / "config.json")
        layout = self._layout(part)
        if layout is None:
            return read_json(file_configs.released(self.kind) / part / "config.json")
        shapes = {name: self.shapes[full] for name, full in self.names(part).items()}
        try:
            config = file_configs.derive(self.kind, part, layout[1], shapes)
        except ConfigError as error:
            raise ConfigError([f"{self.key} = {str(self.path)!r}: {fault.replace('{config}', keys_for(self.key).config)}" for fault in error.faults]) from error
        return config | (self._facts() if part == "unet" else {})

    def _facts(self) -> dict[str, Any]:
        """What other parts than the UNet tell of it."""
        facts = {}
        if self.kind is SD2 and self.has_config("scheduler") and self._schedule[0]["prediction_type"] == "v_prediction":
            facts["sample_size"] = file_configs.V_SIZE
        added = self.shapes.get(f"{file_kind.UNET}label_emb.0.0.weight")
        if added and "text_encoder_2" in self.kind.layouts and self.has_config("text_encoder_2"):  # pooled text, and six numbers of sizes and crop
            facts["addition_time_embed_dim"] = (added[1] - self.config("text_encoder_2")["projection_dim"]) // 6
        return facts

    def where(self, part: str) -> Path | str:
        """The file, and the part in it; or the config's own path."""
        if self.configs:
            return self.configs / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        return f"{self.path} ({part})"

    def outline(self, kind: type, part: str, dtype: Dtype, variant: str | None = None, key: str = MODEL_KEY) -> tuple[nn.Module, Reader]:
        """The part without its weights' values, and what reads them tensor by tensor; ConfigError where a weight is missing, left over or of another shape."""
        from .read_parts import outline

        style = self._layout(part)[1]
        return outline(kind, self.config(part), style, self.weights, self.names(part), dtype, f"{key}: the {part} of {self.path}", self._unused(part))

    def _unused(self, part: str) -> str:
        """Beginning of the names in a part that its model leaves out."""
        return "transformer.resblocks.23." if self.kind is SD2 and part == "text_encoder" else ""

    def tokenizer(self, kind: type, part: str = "tokenizer", key: str = MODEL_KEY) -> Any:
        """CLIP's vocabulary, which every kind uses; open_clip's encoders pad with token 0."""
        if self.configs and (self.configs / part).is_dir():
            return load_or_fault(kind, self.configs / part, key, {})
        padded_with_zero = self.kind is SD2 or part == "tokenizer_2"
        return load_or_fault(kind, TOKENIZER, key, {"pad_token": PAD_ZERO} if padded_with_zero else {})

    def mark(self, part: str) -> str:
        """A digest of the part's own tensors: the file's name, and what else it holds, do not count."""
        return self.weights.mark(list(self.names(part).values()))

    def release(self) -> None:
        """Lets go the tensors of a .ckpt; shapes stay."""
        self.weights.release()
