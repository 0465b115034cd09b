"""A tokenizer is read once: its vocabulary takes half a second of the processor, and hundreds of tests read the same one."""

import functools
import hashlib
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def one_tokenizer():
    """Within it, CLIPTokenizer.from_pretrained gives one tokenizer for folders of the same bytes and the same options; at its end none may have been changed."""
    from transformers import CLIPTokenizer

    read, known = CLIPTokenizer.from_pretrained.__func__, {}

    @functools.wraps(read)
    def once(cls, pretrained_model_name_or_path, **options):
        folder = Path(pretrained_model_name_or_path or "", options.get("subfolder") or "")
        if cls is not CLIPTokenizer or not pretrained_model_name_or_path or not folder.is_dir():
            return read(cls, pretrained_model_name_or_path, **options)
        key = tuple((path.name, hashlib.sha1(path.read_bytes()).digest()) for path in sorted(folder.iterdir()) if path.is_file()), repr(sorted(options.items()))
        if key not in known:
            tokenizer = read(cls, pretrained_model_name_or_path, **options)
            known[key] = tokenizer, _marks(tokenizer)
        return known[key][0]

    with mock.patch.object(CLIPTokenizer, "from_pretrained", classmethod(once)):
        yield
    assert all(_marks(tokenizer) == marks for tokenizer, marks in known.values()), "a tokenizer that tests share was changed"


def _marks(tokenizer) -> tuple:
    return len(tokenizer), tokenizer.special_tokens_map, tokenizer.model_max_length
