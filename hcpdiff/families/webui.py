"""What AUTOMATIC1111's webui and ComfyUI expect of a LoRA file, family by family. No torch.

Sources: the network loaders of AUTOMATIC1111 1.10 and ComfyUI 0.3, and the metadata that sd-scripts writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .unet_names import ANY, SD1, SD2, SDXL, Kind, Module, UnetPlan, known_text_path, unet_modules

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"


@dataclass(frozen=True)
class WebuiFamily:
    """One family's names and metadata in webui's LoRA files.

    `versions`: values of `ss_base_model_version` -> `modelspec.architecture`. `widths`: what its UNet's text attention takes in. `fused`:
    text encoders in whose attention webui uses q, k, v and out_proj only when all four are there (they come from open_clip). `clip_skip`: webui's number
    of the text encoder's layer that the family takes when nothing is skipped.
    """

    name: str
    title: str
    version_stem: str
    plan: UnetPlan
    ldm_names: bool
    prefixes: Mapping[str, str]
    versions: Mapping[str, str]
    context_width: int
    text_widths: Mapping[str, int]
    fused: tuple[str, ...] = ()
    clip_skip: int = 1
    extra: Mapping[str, str] = field(default_factory=dict)

    def webui_base(self, component: str, path: str) -> str | None:
        """`lora_unet_...`: the key before `.lora_down.weight`; None when no module of this family's component has that path."""
        if component not in self.prefixes:
            return None
        if component != UNET:
            known = known_text_path(path) and (path != "text_projection" or component == TEXT_2)
            return f"{self.prefixes[component]}_{path.replace('.', '_')}" if known else None
        module = _loose_modules(self.plan).get(path)
        if module is None or module.kind == "norm":
            return None
        return f"{self.prefixes[component]}_{(module.ldm if self.ldm_names else path).replace('.', '_')}"

    def kind(self, component: str, path: str) -> Kind:
        """Linear or which convolution a known layer is."""
        return _loose_modules(self.plan)[path].kind if component == UNET else "linear"

    @property
    def version(self) -> str | None:
        """The base model version when only the family is known; None where it has several."""
        return next(iter(self.versions)) if len(self.versions) == 1 else None


def _loose_modules(plan: UnetPlan) -> dict[str, Module]:
    """The plan's modules, with a shortcut wherever another choice of widths would have one (shrunken models)."""
    return unet_modules(UnetPlan(plan.down, plan.mid, plan.up, ANY.widths[: len(plan.down)], plan.linear_proj, plan.added))


SD_PREFIXES = {UNET: "lora_unet", TEXT: "lora_te"}
FAMILIES = (
    WebuiFamily("sd1", "Stable Diffusion 1.x", "sd_v1", SD1, False, SD_PREFIXES, {"sd_v1": "stable-diffusion-v1/lora"}, 768, {TEXT: 768}, extra={"ss_v2": "False"}),
    WebuiFamily("sd2", "Stable Diffusion 2.x", "sd_v2", SD2, False, SD_PREFIXES,
                {"sd_v2": "stable-diffusion-v2-512/lora", "sd_v2_v": "stable-diffusion-v2-768-v/lora"}, 1024, {TEXT: 1024}, fused=(TEXT,), extra={"ss_v2": "True"}),
    WebuiFamily("sdxl", "Stable Diffusion XL", "sdxl", SDXL, True, {UNET: "lora_unet", TEXT: "lora_te1", TEXT_2: "lora_te2"},
                {"sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora"}, 2048, {TEXT: 768, TEXT_2: 1280}, fused=(TEXT_2,), clip_skip=2, extra={"ss_v2": "False"}),
)
BY_NAME = {family.name: family for family in FAMILIES}
PREDICTIONS = {"sd_v1": "epsilon", "sd_v2": "epsilon", "sd_v2_v": "v"}  # what a version of a base model says of what it predicts; SDXL's says nothing
PREFIXES = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": TEXT_2}


def by_version(version: str | None) -> WebuiFamily | None:
    """The family that a base model version (`sd_v1`, `sdxl_base_v1-0` ...) belongs to; None for others."""
    return next((family for family in FAMILIES if (version or "").startswith(family.version_stem)), None)


def fits_released(family: WebuiFamily, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
    """Whether widths are those of the family's released models, which settles what names alone leave open."""
    inputs = [(family.context_width, shape[1]) for path, shape in shapes.get(UNET, {}).items() if path.endswith((".attn2.to_k", ".attn2.to_v"))]
    inputs += [(family.text_widths.get(component), shape[1]) for component, layers in shapes.items() if component != UNET
               for path, shape in layers.items() if path.endswith((".q_proj", ".k_proj", ".v_proj", ".fc1"))]
    return bool(inputs) and all(expected == found for expected, found in inputs)


def fits_projections(family: WebuiFamily, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
    """Whether factors of proj_in and proj_out are those of a convolution or of a Linear, as the family has them."""
    return all((len(shape) == 4) != family.plan.linear_proj for path, shape in shapes.get(UNET, {}).items() if path.endswith((".proj_in", ".proj_out")))
