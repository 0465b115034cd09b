"""The visualizer's run: a config -> models with LoRA -> pictures on disk. The wiring only; each step is in a file of its own."""

import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import device as devices
from ..config.infer_schema import InferConfig
from ..data.files import shown
from ..errors import ConfigError, HCPError
from ..families import detect
from ..families.base import Conditioning, Family, Models, text_components
from ..families.place import Place, open_place
from ..families.source import resolve
from ..quiet import quiet_libraries
from ..threads import behind
from . import attach, components, embeddings, encode, pipeline
from .prompt import Parsed
from .request import Picture, Request, batches
from .save import save
from .settings import Facts, describe

MODEL_KEY = "pretrained_model"
LONG = 20  # characters; a longer beginning that all prompts share is left out where each is named


@dataclass
class Studio:
    """All that is ready to draw: models with adapters, the sampler, the prompts' encodings, and where it runs."""

    models: Models
    pipe: object
    device: torch.device
    dtype: torch.dtype
    conditioning: Mapping[tuple[Parsed, int, bool], Conditioning]
    repeats: Sequence[int]
    size: tuple[int, int]
    loras: Sequence[attach.Loaded]
    facts: Facts


class Collector:
    """Goes on after a user's mistake, so that all of them come in one message."""

    def __init__(self):
        self.faults: list[str] = []

    def __call__(self, function: Callable, *args, default=None):
        """What the function returns, or `default` after a fault."""
        try:
            return function(*args)
        except HCPError as error:
            self.faults += error.faults
            return default

    def stop(self) -> None:
        """Raises what was collected."""
        if self.faults:
            raise ConfigError(self.faults)


def run(request: Request, allow: Sequence[str] = (), say: Callable[[str], None] = print) -> list[Path]:
    """Draws a request (of `request.read(cfg)`) and returns the files. Raises HCPError with all that is wrong in what it names."""
    quiet_libraries()
    try:
        return draw(request, prepare(request, allow, say), say)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"out of memory: {(str(error).splitlines() or ['?'])[0]} {less_memory(request.cfg)}") from error


def less_memory(cfg: InferConfig) -> str:
    """What to try where the device has no room, in this order; what is set already is not among it."""
    slicing, tiling = cfg.vae_optimize.slicing, cfg.vae_optimize.tiling
    ways = [("bs=1", cfg.bs > 1), ("dtype=auto", cfg.dtype == "fp32"), ("offload=true (whole parts wait in main memory)", not cfg.offload), ("vae_optimize.tiling=true", not tiling),
            ("vae_optimize.slicing=true", cfg.bs > 1 and not slicing), ("offload=sequential (layer by layer: least memory, slow)", cfg.offload != "sequential"),
            ("smaller infer_args.width and infer_args.height", True)]
    return f"Close other programs that use the device. To try, in this order: {'; '.join(way for way, helps in ways if helps)}."


def prepare(request: Request, allow: Sequence[str], say: Callable[[str], None]) -> Studio:
    """Loads and checks everything, and reports it; nothing has been drawn when an error is raised."""
    cfg = request.cfg
    for notice in request.notices:
        say(f"note: {notice}")
    device = choose_device(cfg.device)
    dtype = devices.compute_dtype(cfg.dtype, device)
    devices.set_threads(cfg.cpu_threads)
    base, family, loras, words = check_parts(request, allow, say)
    models, scheduler = load(cfg, family, base, dtype, allow)
    base.release()
    version = family.base_version(models)
    for notice in dict.fromkeys(notice for lora in loras for notice in lora.say(version)):
        say(f"note: {notice}")
    kernel = devices.set_attention(models.unet, cfg.attention, "attention")
    vocabulary = embeddings.add_words(models, words)
    attach.attach_all(models, loras)
    pipe = pipeline.assemble(models, scheduler)
    size = pipeline.size_of(pipe, cfg.infer_args.get("width"), cfg.infer_args.get("height"))
    known = encode.Words(embeddings.find(request.emb_dir).pattern() if words else None, vocabulary)
    conditioning, repeats = encode_prompts(request, models, known, device, say)
    place(pipe, cfg, device, say)
    if not cfg.offload:  # parts that travel cannot be views of one buffer
        attach.shadow_half(models.unet)
    if pipe.vae.dtype != dtype:
        say(f"note: the VAE works in fp32: its config says that it is not safe in {devices.SHORT[dtype]} (force_upcast).")
    facts = facts_of(models, pipe, cfg, size, dtype, sorted(words))
    report(request, facts, loras, device, kernel, say)
    return Studio(models, pipe, device, dtype, conditioning, repeats, size, loras, facts)


def choose_device(choice: str) -> torch.device:
    """The device that the config names, tried; auto takes the accelerator that is there."""
    if choice == "auto":
        devices.check_build(" Or draw on the CPU: device=cpu")
        return devices.pick_device()
    try:
        device = torch.device(choice)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without the backend
        raise ConfigError(f"device = {choice!r} cannot be used: {(str(error).splitlines() or ['?'])[0]}") from error
    return device


def check_parts(request: Request, allow: Sequence[str], say: Callable[[str], None]) -> tuple[Place, Family, list[attach.Loaded], dict[str, Path]]:
    """The base model's place and family, LoRA files (read) and embedding files (found): all that can be checked before the weights are read."""
    cfg, collect = request.cfg, Collector()
    path, notes = collect(resolve, cfg.pretrained_model, cfg.revision, cfg.variant, MODEL_KEY, default=(None, []))
    base = collect(open_place, path, cfg.config, None if cfg.prediction_type == "auto" else cfg.prediction_type, MODEL_KEY) if path else None
    family = collect(detect, base, MODEL_KEY) if base else None
    for note in (*notes, *((collect(lambda: base.notices, default=())) if family else ())):
        say(f"note: {note}")
    if family:
        kind = pipeline.pipeline_class(family)
        collect.faults += pipeline.check_arguments(kind, cfg.infer_args) + components.check(cfg.new_components, pipeline.part_names(kind), allow)
    texts = [piece.text for prompt in (*request.prompts, *request.neg_prompts) for piece in prompt.pieces]
    words = collect(embeddings.used, embeddings.find(request.emb_dir), texts)
    loras = collect(attach.read_all, request.loras)
    collect.stop()
    return base, family, loras, words


def load(cfg: InferConfig, family: Family, base: Place, dtype: torch.dtype, allow: Sequence[str]) -> tuple[Models, object]:
    """The base model with its new components, in `dtype` on the CPU, and the sampler."""
    parts = [name for name in (*(c.name for c in family.components), "vae") if name not in cfg.new_components]
    models = family.load(base, cfg.pretrained_model, parts, dtype, cfg.vae, cfg.variant, MODEL_KEY)
    if cfg.prediction_type != "auto":
        models.scheduler_config = {**models.scheduler_config, "prediction_type": cfg.prediction_type}
    for name, part in components.build_all(cfg.new_components, allow).items():
        if isinstance(part, torch.nn.Module):
            models.modules[name] = part.requires_grad_(False).eval()
        else:
            models.tokenizers[name] = part
    for name, module in models.modules.items():
        pipeline.cast(module, family.vae_dtype(module, dtype) if name == "vae" else dtype)
    pipeline.check_vae(models)
    check_clip_skip(models, cfg.clip_skip)
    scheduler = components.base_scheduler(models.scheduler_config)
    if "scheduler" in cfg.new_components:
        scheduler = components.build_scheduler(cfg.new_components["scheduler"], scheduler, allow)
    components.check_terminal(scheduler)
    steps, most = cfg.infer_args.get("num_inference_steps", 1), scheduler.config.num_train_timesteps
    if steps > most:
        raise ConfigError(f"infer_args.num_inference_steps = {steps}; the model was trained on {most} steps, so at most that many can be drawn in.")
    return models, scheduler


def check_clip_skip(models: Models, clip_skip: int) -> None:
    """Refuses to skip more layers than there are."""
    most = models.family.most_clip_skip(models)
    if clip_skip > most:
        raise ConfigError(f"clip_skip = {clip_skip}; of this text encoder at most {most} layers can be skipped.")


def encode_prompts(request: Request, models: Models, words: encode.Words, device: torch.device, say: Callable[[str], None]):
    """((prompt, chunks, negative) -> encoding, chunks per prompt). Each distinct text is encoded once; the encoder goes back to the CPU after."""
    needed = [max(pair) for pair in zip(encode.chunks_needed(models, request.prompts, words), encode.chunks_needed(models, request.neg_prompts, words))]
    limit = request.cfg.N_repeats
    repeats = needed if limit == "auto" else [limit] * len(needed)
    encoders = [models.modules[component.name] for component in text_components(models.family)]
    out: dict[tuple[Parsed, int, bool], Conditioning] = {}
    for module in encoders:
        module.to(device)
    for prompts, negative in ((request.prompts, False), (request.neg_prompts, True)):
        for prompt, chunks in zip(prompts, repeats):
            if (prompt, chunks, negative) in out:
                continue
            made = encode.encode_negative if negative else encode.encode
            out[prompt, chunks, negative] = made(models, prompt, chunks, words, request.cfg.clip_skip).to(device)
            count, lost = encode.cut_text(models, prompt, words, chunks)
            if count:
                say(f"warning: {count} tokens of the prompt do not fit into N_repeats = {chunks} (× 75) and are cut: {lost!r}. N_repeats=auto takes them all.")
    for module in encoders:
        module.to("cpu")
    return out, repeats


def place(pipe, cfg: InferConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Puts the parts where they run, and turns on what saves memory."""
    if cfg.vae_optimize.tiling:
        pipe.vae.enable_tiling()
    if cfg.vae_optimize.slicing:
        pipe.vae.enable_slicing()
    if not cfg.offload or device.type == "cpu":
        if cfg.offload:
            say("note: offload has no effect on a CPU: everything is in main memory already.")
        pipe.to(device)
    else:
        offload(pipe, cfg.offload, device)


def offload(pipe, how: bool | str, device: torch.device) -> None:
    """Parts come to the device when they are used. Layer by layer, the VAE stays there: it must be able to change its dtype."""
    if how == "sequential":
        pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, "vae"]
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_model_cpu_offload(device=device)


def facts_of(models: Models, pipe, cfg: InferConfig, size: tuple[int, int], dtype: torch.dtype, words: list[str]) -> Facts:
    """What is written into every picture."""
    arguments = pipeline.defaults(type(pipe)) | cfg.infer_args
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    local = Path(cfg.pretrained_model).exists()
    name = Path(cfg.pretrained_model).resolve().name if local else cfg.pretrained_model
    return Facts(name, models.family.base_version(models), *size, arguments["num_inference_steps"], arguments["guidance_scale"],
                 type(pipe.scheduler).__name__, dict(pipe.scheduler.config), devices.SHORT[dtype], words, versions)


def report(request: Request, facts: Facts, loras: Sequence[attach.Loaded], device: torch.device, kernel: str, say: Callable[[str], None]) -> None:
    """One block before drawing: what is drawn with what."""
    seeds = [str(picture.seed) for picture in request.pictures]
    shown = ", ".join(seeds if len(seeds) <= 8 else [*seeds[:4], "…", seeds[-1]])
    lines = [("model", f"{request.cfg.pretrained_model} ({facts.family})"), ("device", f"{devices.describe(device)}, {facts.dtype}, attention {kernel}"),
             *[("LoRA", line) for lora in loras for line in lora.describe()], *[("new", f"{name}: {spec['_target_']}") for name, spec in request.cfg.new_components.items()],
             *([("embeddings", ", ".join(facts.embeddings))] if facts.embeddings else []),
             ("prompt", first_of(request.texts)), *([("negative", first_of(request.neg_texts))] if any(request.neg_texts) else []),
             ("sampler", f"{facts.scheduler}, {facts.steps} steps, guidance {facts.guidance:g}"),
             ("pictures", f"{len(seeds)} of {facts.width}x{facts.height}, seed {shown}"), ("to", str(request.out_dir))]
    for name, text in lines:
        say(f"  {name:<11}{text}")


def first_of(texts: Sequence[str]) -> str:
    """The first of the texts, on one line of at most 120 characters, and how many other ones there are."""
    others = len(set(texts)) - 1
    return cut(one_line(texts[0]), 120) + (f"  and {others} more" if others else "")


def one_line(text: str) -> str:
    """A prompt as a terminal can show it."""
    return shown(" ".join(text.split()))


def cut(text: str, most: int) -> str:
    """At most so many characters of it."""
    return f"{text[: most - 1]}…" if len(text) > most else text or "''"


def labels(texts: Sequence[str]) -> list[str]:
    """What tells the pictures of several prompts apart: the number of each, and its text from where it differs from the others. Nothing for one prompt."""
    if len(texts) == 1:
        return [""]
    lines = [one_line(text) for text in texts]
    alike = os.path.commonprefix(lines).rfind(" ") + 1 if len(set(lines)) > 1 else 0
    alike = alike if alike > LONG else 0
    return [f"  prompt {number}: {'… ' if alike else ''}{cut(line[alike:], 60)}" for number, line in enumerate(lines, 1)]


def draw(request: Request, studio: Studio, say: Callable[[str], None]) -> list[Path]:
    """Draws all pictures, batch by batch; each is on disk before the next begins, or beside a GPU before the next is done. What was drawn is written whatever
    comes after it."""
    started, total, names = time.perf_counter(), len(request.pictures), labels(request.texts)
    beside = 0 if studio.device.type == "cpu" else 1
    with attach.copied(studio.models.unet), closing(behind(drawn_batches(request, studio, total, say), lambda drawn: write(request, studio, *drawn), beside)) as written:
        paths: list[Path] = []
        for batch in written:
            for picture, path in zip(request.pictures[len(paths) :], batch):
                say(f"{path}{names[picture.prompt]}")
            paths += batch
    say(f"{total} picture{'s' if total > 1 else ''} in {time.perf_counter() - started:.1f} s")
    return paths


def drawn_batches(request: Request, studio: Studio, total: int, say: Callable[[str], None]) -> Iterator[tuple[Sequence[Picture], list]]:
    """Each batch with its images, when they are asked for."""
    for batch in batches(request.pictures, studio.repeats, request.cfg.bs):
        first, last = batch[0].index + 1, batch[-1].index + 1
        studio.pipe.set_progress_bar_config(disable=None, desc=f"picture {first} of {total}" if first == last else f"pictures {first}-{last} of {total}")
        drawn = draw_batch(request, studio, batch)
        if drawn.redecoded:
            say(f"note: the VAE's result was black or not finite in {studio.facts.dtype}; it was decoded again in fp32.")
        yield batch, drawn.images


def write(request: Request, studio: Studio, batch: Sequence[Picture], images: Sequence) -> list[Path]:
    """The files of a batch."""
    return [save(image, request.out_dir, picture.seed, describe(request, picture, studio.facts), request.cfg.save.image_type, request.cfg.save.quality,
                 request.cfg.save.settings) for picture, image in zip(batch, images)]


def draw_batch(request: Request, studio: Studio, batch: Sequence[Picture]) -> pipeline.Drawn:
    """The pictures of one batch."""
    def together(prompts: Sequence[Parsed], negative: bool) -> Conditioning:
        return Conditioning.cat([studio.conditioning[prompts[p.prompt], studio.repeats[p.prompt], negative] for p in batch])

    args = {name: value for name, value in request.cfg.infer_args.items() if name not in ("width", "height")}
    latents = pipeline.sample(studio.pipe, together(request.prompts, False), together(request.neg_prompts, True), [p.seed for p in batch], *studio.size, args)
    return pipeline.decode(studio.pipe, latents)
