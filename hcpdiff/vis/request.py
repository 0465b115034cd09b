"""What is to be drawn, checked as far as it can be without torch: prompts, seeds, batches, files. All faults come together."""

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.infer_schema import NUMBERS, PAIRS, InferConfig
from ..errors import ConfigError
from .lora_files import Finder, LoraSource, as_list
from .prompt import Parsed, parse
from .save import check_folder

DEFAULT_EMB_DIR = "embs"  # the one folder that may be missing


@dataclass(frozen=True)
class Picture:
    """One picture: its place in the run, its prompt (an index) and its seed."""

    index: int
    prompt: int
    seed: int


@dataclass(frozen=True)
class Request:
    """A config, read: texts as written and as parsed, one entry per prompt, and the pictures in the order of drawing."""

    cfg: InferConfig
    texts: tuple[str, ...]
    neg_texts: tuple[str, ...]
    prompts: tuple[Parsed, ...]
    neg_prompts: tuple[Parsed, ...]
    pictures: tuple[Picture, ...]
    loras: tuple[LoraSource, ...]
    emb_dir: Path | None
    out_dir: Path
    notices: tuple[str, ...]


def read(cfg: InferConfig) -> Request:
    """Checks a config and makes its request; ConfigError with every fault. Draws nothing and loads no model."""
    faults: list[str] = list(cfg.check())
    notices: list[str] = []
    texts, neg_texts = prompt_texts(cfg, faults)
    prompts = parsed(texts, "prompt", cfg.prompt_syntax, faults, notices)
    negatives = parsed(neg_texts, "neg_prompt", cfg.prompt_syntax, faults, notices)
    finder = Finder()
    loras = finder.all(cfg, common_tags(prompts, negatives, faults))
    seeds = picture_seeds(cfg, faults, notices)
    emb_dir = embedding_folder(cfg, faults)
    faults += finder.faults + check_folder(Path(cfg.out_dir))
    if faults:
        raise ConfigError(faults)
    cfg = dataclasses.replace(cfg, infer_args=settled(cfg.infer_args))
    if len(neg_texts) == 1:
        neg_texts, negatives = neg_texts * len(texts), negatives * len(texts)
    pictures = tuple(Picture(n * len(seeds) + i, n, seed) for n in range(len(texts)) for i, seed in enumerate(seeds))
    notices += finder.notices + repeated(pictures, prompts, negatives)
    return Request(cfg, tuple(texts), tuple(neg_texts), tuple(prompts), tuple(negatives), pictures, tuple(loras), emb_dir,
                   Path(cfg.out_dir), tuple(dict.fromkeys(notices)))


def repeated(pictures: Sequence[Picture], prompts: Sequence[Parsed], negatives: Sequence[Parsed]) -> list[str]:
    """A notice of the pictures that will be the same as an earlier one, if there are any."""
    first: dict[tuple, int] = {}
    pairs = [(picture.index + 1, first.setdefault((prompts[picture.prompt].pieces, negatives[picture.prompt].pieces, picture.seed), picture.index + 1)) for picture in pictures]
    again = [f"{number} as {earlier}" for number, earlier in pairs if number != earlier]
    if not again:
        return []
    said = ", ".join(again[:3] + ["…"] * (len(again) > 3))
    have = "has" if len(again) == 1 else "have"
    return [f"{len(again)} of {len(pictures)} pictures {have} the same prompt, negative prompt and seed as an earlier one, and will be the same: picture {said}."]


def prompt_texts(cfg: InferConfig, faults: list[str]) -> tuple[list[str], list[str]]:
    """Prompts (of prompt or prompt_file) and negative prompts: one, or as many as prompts."""
    texts = as_list(cfg.prompt)
    if cfg.prompt_file is not None:
        if any(texts):
            faults.append("prompt and prompt_file are both given; give one.")
        texts = file_lines(cfg.prompt_file, faults)
    elif not texts:
        faults.append("prompt is an empty list; give at least one prompt.")
    negatives = as_list(cfg.neg_prompt) or [""]
    if len(negatives) not in (1, len(texts)) and texts:
        faults.append(f"neg_prompt has {len(negatives)} entries for {len(texts)} prompts; give one for all, or one for each.")
    return texts, negatives


def file_lines(name: str, faults: list[str]) -> list[str]:
    """The lines of a prompt file that are not blank."""
    try:
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        faults.append(f"prompt_file = {name!r} is not UTF-8 text (byte {error.start}): save it as UTF-8.")
        return []
    except OSError as error:
        faults.append(f"prompt_file = {name!r} cannot be read: {error.strerror or error}.")
        return []
    if not lines:
        faults.append(f"prompt_file = {name!r} holds no prompt.")
    return lines


def parsed(texts: Sequence[str], key: str, syntax: str, faults: list[str], notices: list[str]) -> list[Parsed]:
    """The prompts that could be read; faults and warnings of the others."""
    out = []
    for n, text in enumerate(texts):
        try:
            out.append(parse(text, syntax, key if len(texts) == 1 else f"{key}[{n}]"))
            notices += out[-1].notices
        except ConfigError as error:
            faults += error.faults
    return out


def common_tags(prompts: Sequence[Parsed], negatives: Sequence[Parsed], faults: list[str]):
    """The LoRA tags of the prompts (webui syntax), which must be the same in all: the model is prepared once."""
    if len({p.loras for p in prompts}) > 1:
        faults.append("the prompts have different <lora:…> tags; draw them in runs of their own.")
    if any(p.loras for p in negatives):
        faults.append("neg_prompt has a <lora:…> tag; it belongs into the prompt.")
    return prompts[0].loras if prompts else ()


def picture_seeds(cfg: InferConfig, faults: list[str], notices: list[str]) -> list[int]:
    """The seeds of one prompt's pictures."""
    count = cfg.bs * cfg.num
    if isinstance(cfg.seed, list):
        if not cfg.seed:
            faults.append("seed is an empty list; give null for a random one.")
        elif cfg.num != 1 and count != len(cfg.seed):
            faults.append(f"seed is a list of {len(cfg.seed)}, but bs × num = {cfg.bs} × {cfg.num}; a list draws one picture per seed (bs at a time): leave num at 1.")
        return list(cfg.seed)
    first = cfg.seed
    if first is None:
        first = secrets.randbelow(2**32 - count)
        notices.append(f"seed = null: took {first} (seed={first} draws the same again).")
    return [first + i for i in range(count)]


def settled(args: dict) -> dict:
    """infer_args without those that are null (the pipeline's own value counts), whole numbers as integers, pairs as tuples."""
    def one(name: str, value):
        return tuple(value) if name in PAIRS else int(value) if NUMBERS.get(name, (0, float))[1] is int else value

    return {name: one(name, value) for name, value in args.items() if value is not None}


def embedding_folder(cfg: InferConfig, faults: list[str]) -> Path | None:
    """emb_dir, None where there is none; only the default may be missing."""
    if cfg.emb_dir is None:
        return None
    folder = Path(cfg.emb_dir)
    if folder.is_dir():
        return folder
    if cfg.emb_dir.rstrip("/\\") != DEFAULT_EMB_DIR:
        faults.append(f"emb_dir = {cfg.emb_dir!r}: there is no such folder (null: no embeddings).")
    return None


def batches(pictures: Sequence[Picture], repeats: Sequence[int], bs: int) -> list[list[Picture]]:
    """Pictures drawn together: up to `bs` neighbours whose prompts fill the same number of chunks (`repeats`, one per prompt).

    A prompt that is padded to a longer neighbour would give another picture, so a picture would depend on its batch.
    """
    out: list[list[Picture]] = []
    for picture in pictures:
        if not out or len(out[-1]) == bs or repeats[out[-1][0].prompt] != repeats[picture.prompt]:
            out.append([])
        out[-1].append(picture)
    return out
