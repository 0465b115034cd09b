"""Make CLIP's tokenizer files from the merge list that the open-clip-torch wheel carries (MIT).

    python scripts/make_tokenizer.py [--wheel WHEEL] [--out hcpdiff/assets/clip_tokenizer]

Without --wheel, pip fetches the wheel (not its dependencies). The vocabulary is built as in OpenAI's CLIP: 256 bytes,
the same 256 ending a word, one token per merge, and the two special tokens: 49408 in all.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "open-clip-torch==3.3.0"
MERGE_LIST = "open_clip/bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408
MERGES = VOCAB_SIZE - 2 * 256 - 2  # the list is longer; CLIP uses its head
START, END = "<|startoftext|>", "<|endoftext|>"
PROBE = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407])

NOTICE = f"""\
vocab.json and merges.txt are CLIP's byte-pair encoding. scripts/make_tokenizer.py writes them from
{MERGE_LIST} of the Python package {PACKAGE}
(https://github.com/mlfoundations/open_clip), which carries it from https://github.com/openai/CLIP.
Both are under the MIT License:

"""
OPENAI_COPYRIGHT = "Copyright (c) 2021 OpenAI\n"


def fetch_wheel(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def byte_symbols() -> list[str]:
    """One printable character for each byte, in the order in which CLIP numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def read_wheel(wheel: Path) -> tuple[list[str], str]:
    """The merges that CLIP uses, 'left right' each, and the text of the package's licence."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(MERGE_LIST)).decode("utf-8").split("\n")
        licence = next(name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        return lines[1 : MERGES + 1], archive.read(licence).decode("utf-8")


def write_tokenizer(merges: list[str], licence: str, out: Path) -> None:
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m.split()) for m in merges] + [START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != VOCAB_SIZE:
        raise SystemExit(f"the vocabulary has {len(vocab)} tokens; CLIP's has {VOCAB_SIZE}: is this {PACKAGE}?")
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **specials}
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(specials, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "NOTICE": NOTICE + OPENAI_COPYRIGHT + licence,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_bytes(text.encode("utf-8"))  # bytes: the same file on every system


def check(out: Path) -> None:
    from transformers import CLIPTokenizer

    prompt, ids = PROBE
    found = CLIPTokenizer.from_pretrained(out)(prompt).input_ids
    if found != ids:
        raise SystemExit(f"{prompt!r} gives {found}, not {ids}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path("hcpdiff/assets/clip_tokenizer"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        merges, licence = read_wheel(args.wheel or fetch_wheel(Path(folder)))
    write_tokenizer(merges, licence, args.out)
    check(args.out)
    print(f"{args.out}: {VOCAB_SIZE} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
