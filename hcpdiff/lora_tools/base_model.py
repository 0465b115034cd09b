"""A base model as files: a diffusers folder or one safetensors file, read layer by layer, never whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..checkpoint.convert import Layers, other_family
from ..checkpoint.format import COMPONENTS
from ..checkpoint.safetensors_header import ITEM_BYTES
from ..errors import CheckpointError
from ..families import webui
from ..families.file_configs import said_prediction
from ..families.file_kind import idle, in_two_ways, kind_of, spelt_otherwise, unread
from ..families.ldm_names import Source
from ..families.source import read_index, read_json, resolve
from ..families.weight_file import WeightFile
from ..lora_tensors import LoraTensors
from . import base_names

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Spot:
    """A layer's weight in one of the files."""

    file: WeightFile
    place: Source

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the tensor under the key."""
        return self.file.header.entries[self.place.name].shape

    @property
    def dtype(self) -> str:
        """Its type as safetensors names it."""
        return self.file.header.entries[self.place.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight, (out, in) or (out, in, kh, kw)."""
        shape = self.stored[::-1] if self.place.turned else self.stored
        return shape if self.place.third is None else (shape[0] // 3, *shape[1:])

    def cut(self, tensor: Tensor) -> Tensor:
        """The layer's weight as a view of the tensor under the key."""
        tensor = tensor.t() if self.place.turned else tensor
        if self.place.third is None:
            return tensor
        rows = tensor.shape[0] // 3
        return tensor[self.place.third * rows:(self.place.third + 1) * rows]

    def read(self) -> Tensor:
        """The layer's weight in the type that it is stored in."""
        return self.cut(self.file.tensor(self.place.name))


@dataclass(frozen=True)
class BaseModel:
    """The files of a base model. `parts`: component -> its files, for a folder; a single file is in `single`."""

    path: Path
    parts: Mapping[str, list[WeightFile]] = field(default_factory=dict)
    single: WeightFile | None = None
    notices: tuple[str, ...] = ()

    @property
    def files(self) -> list[WeightFile]:
        """Every file that may hold a layer."""
        return [self.single] if self.single else [file for files in self.parts.values() for file in files]

    @property
    def family(self) -> str | None:
        """sd1, sd2 or sdxl, as `webui.BY_NAME` calls them; None where it is something else, or has no UNet."""
        if self.single:
            kind = kind_of(self.single.shapes, "the vae of a config", "--lora_path")
            return None if isinstance(kind, str) else kind.name
        shapes = {name: entry.shape for file in self.parts.get("unet", ()) for name, entry in file.header.entries.items()}
        if not shapes or "add_embedding.linear_1.weight" in shapes:
            return "sdxl" if shapes else None
        return "sd2" if any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.items()) else "sd1"

    @property
    def prediction(self) -> str | None:
        """What its scheduler config or the file says that it predicts (epsilon, v_prediction, sample); None where they do not say."""
        if self.single:
            return (said_prediction(self.single.shapes, self.single.metadata) or (None,))[0]
        config = self.path / "scheduler" / "scheduler_config.json"
        return str(read_json(config).get("prediction_type", "epsilon")) if config.is_file() else None

    def spots(self, component: str, path: str) -> list[Spot]:
        """Every copy of a layer's weight: more than one where a folder holds variants (fp16 beside fp32); none where the model lacks the layer."""
        if self.single:
            found = [Spot(self.single, place) for place in base_names.in_single_file(component, path) if place.name in self.single.header.entries]
            return found[:1]
        return [Spot(file, place) for file in self.parts.get(component, ()) for place in base_names.in_folder(path) if place.name in file.header.entries]

    def spot(self, component: str, path: str) -> Spot | None:
        """The copy with the most digits."""
        return max(self.spots(component, path), key=lambda spot: ITEM_BYTES[spot.dtype], default=None)

    def layers(self) -> Iterator[tuple[str, str, Spot]]:
        """Every Linear and convolution that the model has: component, path, its best copy."""
        for component, path in base_names.known_layers():
            spot = self.spot(component, path)
            if spot is not None:
                yield component, path, spot


def open_model(source: str, key: str) -> BaseModel:
    """The model that a user names by `key` (an option): a folder, a .safetensors file, or a hub id. CheckpointError or ConfigError says what is wrong."""
    path, notices = Path(source), []
    if path.is_file():
        model = BaseModel(path, single=_opened(path))
        faults = _in_two_ways(model.single, f"{key} = {source!r}")
        if faults:
            raise CheckpointError(faults)
        return model
    if not path.is_dir():
        path, notices = resolve(source, key=key)
    read_index(path, key)
    parts = {component: _files(path / component) for component in COMPONENTS if (path / component).is_dir()}
    empty = [component for component, files in parts.items() if not files]
    if empty or not parts:
        raise CheckpointError(f"{key} {source}: there are no .safetensors weights in {', '.join(f'{part}/' for part in empty) or 'it'}. Pickles (.bin) are not read "
                              f"here: load the model with diffusers and save it with save_pretrained(FOLDER).")
    return BaseModel(path, parts, notices=tuple(notices))


def _in_two_ways(file: WeightFile, what: str) -> list[str]:
    """Faults of a single file that has a part, or a layer, under two names, of which only one would be read."""
    shapes, faults = file.shapes, []
    kind = kind_of(shapes, "", "")
    if not isinstance(kind, str):
        for part, others in spelt_otherwise(kind, unread(kind, shapes)).items():
            spelling = kind.layout(part, shapes)[0]
            faults.append(in_two_ways(what, part, sum(name.startswith(spelling) and not idle(name) for name in shapes), spelling, others))
    for component in COMPONENTS:
        found = [{place.name for place in base_names.in_single_file(component, path)} & shapes.keys() for part, path in base_names.known_layers() if part == component]
        twice = [sorted(names) for names in found if len(names) > 1]
        if twice and not any(f"its {component} in" in fault for fault in faults):
            faults.append(f"{what} has layers of its {component} under two names ({len(twice)}), such as {' and '.join(twice[0])}. "
                          f"Which are meant cannot be told: save the model with one of them alone.")
    return faults


def _files(folder: Path) -> list[WeightFile]:
    return [_opened(file) for file in sorted(folder.glob("*.safetensors"))]


def _opened(path: Path) -> WeightFile:
    """The file. CheckpointError where its header is not sound."""
    file = WeightFile(path)
    _ = file.header  # read now and kept
    return file


def misfits(model: BaseModel, layers: Layers, metadata: Mapping[str, str]) -> list[str]:
    """Why the LoRA does not fit the model, a line for each kind of fault, or that it is for another family; empty: every layer has its place and its shape."""
    found = _misfits(model, layers)
    other = other_family(layers, metadata, model.family and webui.BY_NAME[model.family].version_stem) if found else ""
    return [other] if other else found


def _misfits(model: BaseModel, layers: Layers) -> list[str]:
    lacking: dict[str, list[str]] = {}
    wrong: list[str] = []
    for component, named in layers.items():
        for path, lora in named.items():
            spots = model.spots(component, path)
            if not spots:
                lacking.setdefault(component, []).append(path)
            wrong += [f"{component} {path} ({spot.dtype} {spot.shape} in the model, {_full(lora)} in the LoRA)" for spot in spots if not _fits(spot, lora)]
    lines = _what_else(model) if sum(map(len, lacking.values())) == sum(map(len, layers.values())) else []
    lines += [f"{len(paths)} of {len(layers[component])} layers of {component} are not in {model.path.name}: {_few(paths)}." for component, paths in lacking.items()]
    return lines + ([f"{len(wrong)} layers have another shape there, or a type that cannot be added to (scaled or quantized): {_few(wrong)}."] if wrong else [])


def no_model(model: BaseModel) -> list[str]:
    """That a file is no base model but something else, such as a LoRA; empty where it has a layer that a LoRA can change."""
    return _what_else(model) if next(model.layers(), None) is None else []


def _what_else(model: BaseModel) -> list[str]:
    """What a file is that has none of the layers."""
    shapes = {name: entry.shape for file in model.files for name, entry in file.header.entries.items()} if model.single else {}
    kind = kind_of(shapes, "the vae of a config", "--lora_path") if shapes else None
    return [f"{model.path.name} is {kind}."] if isinstance(kind, str) else []


def _scaled(spot: Spot) -> bool:
    """Whether the weight is stored as small numbers times a scale (scaled fp8)."""
    base = spot.place.name.removesuffix("weight")
    return any(f"{base}{name}" in spot.file.header.entries for name in ("scale_weight", "weight_scale", "weight_scale_inv", "weight.absmax"))


def _fits(spot: Spot, lora: LoraTensors) -> bool:
    kernel = tuple(lora.down.shape[2:])
    same_kernel = spot.shape[2:] == kernel or {spot.shape[2:], kernel} == {(), (1, 1)}
    return spot.shape[:2] == _full(lora)[:2] and same_kernel and spot.dtype in FLOATS and not _scaled(spot)


def _full(lora: LoraTensors) -> tuple[int, ...]:
    return (lora.up.shape[0], *lora.down.shape[1:])


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
