"""Whatever a caption or template file holds, it gives text or a fault that names the file, never a crash."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from hcpdiff.data.caption import load_captions
from hcpdiff.data.template import Prompter, load_templates

json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                         max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
                 json_like.map(lambda value: json.dumps(value).encode())), st.sampled_from([".json", ".jsonl", ".yaml", ".txt"]))
def test_no_caption_file_does_more_than_fault(tmp_path_factory, raw, ending):
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    path.write_bytes(raw)
    faults = []
    captions = load_captions(str(path), "imgs", ["1.png", "a/b.jpg"], "w", faults)
    assert len(captions.texts) == 2 and all(text is None or isinstance(text, str) for text in captions.texts)
    assert all(path.name in fault for fault in faults)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab{}\\,: 。pt1\n", max_size=30), st.text(max_size=12))
def test_no_template_does_more_than_fault(tmp_path_factory, line, caption):
    path = tmp_path_factory.getbasetemp() / "fuzz_template.txt"
    path.write_text(line, encoding="utf-8")
    faults = []
    words = {"pt1": "trig", "a": "", "b": "{caption}"}
    templates = load_templates(str(path), True, words, "w", faults)
    if not faults:
        prompt = Prompter(tuple(templates), words).prompt(caption, None)
        assert prompt == prompt.strip()
