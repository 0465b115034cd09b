"""How the fuzz tests run: the same examples each time in the suite; `HCPDIFF_FUZZ=50` runs fifty times as many, new ones each time."""

import functools
import os
import signal
import threading
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hcpdiff.errors import HCPError

TIMES = int(os.environ.get("HCPDIFF_FUZZ", "1"))
CPU_SECONDS = 30  # of one example; the slowest that is known takes one
ran: Counter = Counter()  # examples by test


def fuzz(examples: int) -> settings:
    """Settings of a fuzz test that runs so many examples in the suite."""
    return settings(max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example])


def counted(test):
    """Counts a test's examples, and stops one that takes more than CPU_SECONDS of this process."""
    def stop(number, frame):
        raise AssertionError(f"an example took more than {CPU_SECONDS} s of the processor")

    @functools.wraps(test)
    def wrapper(*args, **kwargs):
        ran[test.__name__] += 1
        timed = hasattr(signal, "SIGVTALRM") and threading.current_thread() is threading.main_thread()
        if timed:
            signal.signal(signal.SIGVTALRM, stop)
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            return test(*args, **kwargs)
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    return wrapper


def only_ours(work, *args, **kwargs):
    """What work returns; None after an error of ours, whose faults must be texts. Any other error passes through and fails the test."""
    try:
        return work(*args, **kwargs)
    except HCPError as error:
        assert error.faults and all(isinstance(fault, str) and fault.strip() for fault in error.faults)
        return None


# -- values that break things ----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["", " ", "~", "null", "---", "true", "no", "007", "1e5", "1e999", ".inf", "-.inf", ".nan", "0x1f", "12:30", "2023-01-01", "=", "<<", "*a", "&a", "!!x", "a: b", "- a", "# a", "[", "]",
                         "{", "}", "{a: 1}", "[1, 2]", "'", '"', "\\", "\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ud800", "😀", "猫", "é", "e\u0301", "a" * 3000, "../../x", "/etc/passwd",
                         "C:\\x", "~/x", "x/y", "%s%n", "9" * 400, "-1", "0", "0.1", "4.0", "1e-320", "9223372036854775807", "9223372036854775808", "re:", "re:(", "re:(?P<x", "re:.*", "run.yaml", "pictures",
                         "torch.optim.AdamW", "os.system", "torch.optim.adamw", "_target_", "latest", "auto"])
EXPRESSIONS = st.sampled_from(["${seed}", "${data}", "${.lr}", "${..lr}", "${...}", "${train.lr}", "${lora_unet.0.lr}", "${lora_unet[0].lr}", "${nothing}", "${", "${}", "${:}", "$<", "$<seed>", "\\${seed}",
                               "${hcp.time:}", "${hcp.time:%Q%}", "${hcp.time:'%Y'}", '${hcp.eval:"1/0"}', '${hcp.eval:"9**9**9"}', "${hcp.eval:${seed}*2}", "${times:512,512}", "${times:a}", "${oc.env:HOME}",
                               "${a.${b}}", "${${seed}}", "${_base_}", "${exp_dir}${exp_dir}", "x${seed}y"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-10, 10), st.floats(), st.text(max_size=8), WORDS, EXPRESSIONS)
KEYS = st.one_of(st.sampled_from(["_target_", "_base_", "_partial_", "_args_", "_recursive_", "lr", "layers", "source", "bucket", "img_root", "<<", "0", "a.b", "", "é", "type", "name"]), st.text(max_size=5))
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)


def places(tree, path=()) -> list[tuple]:
    """Paths of every value below a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


@st.composite
def mutated(draw, tree, values=TREES, most=3):
    """A copy of a tree with a few values replaced, taken out, renamed, wrapped or added."""
    import copy

    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        found = places(tree)
        if not found:
            break
        *parents, last = draw(st.sampled_from(found))
        node = functools.reduce(lambda inner, part: inner[part], parents, tree)
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "wrap", "add", "nest"]))
        if what == "replace":
            node[last] = draw(values)
        elif what == "delete":
            del node[last]
        elif what == "wrap":
            node[last] = draw(st.sampled_from([lambda value: [value], lambda value: {"a": value}, lambda value: [value, value]]))(node[last])
        elif what == "nest":
            for _ in range(draw(st.sampled_from([3, 30, 60, 120]))):
                node[last] = [node[last]]
        elif isinstance(node, dict):
            node[draw(KEYS)] = node.pop(last) if what == "rename" else draw(values)
        else:
            node.append(draw(values))
    return tree


PIECES = st.sampled_from(["\n", "\n\n", "  ", "\t", ":", ": ", "- ", "- [", "{", "}", "]", "'", '"', "#", "&a ", "*a", "<<: *a", "!!python/object:os.system ", "|", ">-", "%YAML 1.1\n", "---\n", "...\n", "\0", "\r", "\x85",
                          "\ufeff", "😀", "\ud800", "${", "}", "${seed}", "\\", "_base_: x\n", "_base_: [run.yaml]\n", "? ", "null", "=", ",", "9" * 200, "[" * 60, "猫"])


@st.composite
def spoilt(draw, text: str, pieces=PIECES):
    """The text with a few pieces put in, taken out or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 5, 40])))
        text = text[:start] + draw(st.one_of(pieces, st.just(""), st.just(text[start:end] * 2))) + text[end:]
    return text


@st.composite
def flipped(draw, raw: bytes):
    """The bytes with some changed, cut off, repeated or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(raw) - 1)) | st.integers(0, min(200, max(0, len(raw) - 1))))
        what = draw(st.sampled_from(["set", "set", "cut", "add", "drop", "huge"]))
        if what == "set":
            raw = raw[:start] + bytes([draw(st.integers(0, 255))]) + raw[start + 1:]
        elif what == "cut":
            raw = raw[:start]
        elif what == "drop":
            raw = raw[:start] + raw[start + draw(st.integers(1, 8)):]
        elif what == "huge":
            raw = raw[:start] + b"\xff\xff\xff\x7f" + raw[start + 4:]
        else:
            raw = raw[:start] + draw(st.binary(max_size=8)) + raw[start:]
    return raw
