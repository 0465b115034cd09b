"""What a step needs of memory, counted without it (benchmarks/fit.py): against tensors that there are, and against torch's own allocator."""

import re
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fit
from fit import CONFIGS, GUIDES, META, Case, need

MIB = 2**20
CPU = torch.device("cpu")
WAYS = [{}, {"quantize": "int8"}, {"quantize": "nf4", "checkpointing": True}]


@pytest.mark.parametrize("way", WAYS)
def test_tensors_without_memory_are_counted_as_those_that_there_are(tiny_sd1, way):
    case = Case(128, 2, 4, torch.float32, **way)
    counted, real = need(tiny_sd1, case, kernel="cpu"), need(tiny_sd1, case, CPU, kernel=None)
    assert (counted.weights, counted.activations) == (real.weights, real.activations) and counted.activations > MIB
    assert 0 <= real.adapters - counted.adapters < 4 * 1000, "a counter of AdamW's for each tensor is on the CPU in both"


def allocated(folder: Path, case: Case) -> int:
    """The most that torch's allocator of the CPU gave in a step, above what there was before it."""
    most = []

    @contextmanager
    def watched():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            yield
        now = 0
        for event in sorted((event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns()):
            now += event.nbytes()
            most.append(now)

    need(folder, case, CPU, kernel=None, around=watched)
    return max(most)


@pytest.mark.parametrize("family, dtype, checkpointing", [("sd1", torch.float32, False), ("sd1", torch.float32, True), ("sdxl", torch.bfloat16, False)])
def test_the_allocator_gives_what_is_counted(request, family, dtype, checkpointing):
    folder, case = request.getfixturevalue(f"tiny_{family}"), Case(256, 1, 4, dtype, checkpointing=checkpointing)
    counted, given = need(folder, case, kernel="cpu").activations, allocated(folder, case)
    assert 0.99 * counted < given < 1.03 * counted + 128 * 1024, "what single kernels take for themselves is all that is not counted"


def test_attention_keeps_no_matrix_of_all_tokens_by_all_tokens():
    activations = {pixels: need(CONFIGS / "sd1", Case(pixels, 1, 4)).activations for pixels in (256, 512)}
    assert activations[512] < 4.1 * activations[256]
    heads, tokens = 8, (512 // 8) ** 2
    assert activations[512] < 2 * 5 * heads * tokens**2, "five of those matrices in bf16 are kept else, of the outermost blocks alone"
    with pytest.raises(AssertionError, match="another way"), fit.attention("gpu"):
        torch.zeros(1, device=META)


def test_inputs_of_the_adapters_are_those_that_were_measured():
    """docs/performance.md, SD1.5 at 256 px: weights 3280 and adapters 46 MiB; activations of the frozen model, of which 376 are tensors, and inputs 79."""
    found = need(CONFIGS / "sd1", Case(256, 1, 8, torch.float32), kernel="cpu", undo=False)
    assert found.weights / MIB == pytest.approx(3280, rel=1e-3) and found.adapters / MIB == pytest.approx(46, rel=0.02)
    assert abs(found.activations / MIB - (376 + 79)) < 10


def test_the_guides_have_what_is_counted():
    rows = [re.search(r"<!-- counted: sd1 -->.*?\n\| true \| 1 \| ([\d.]+) \|", page.read_text("utf-8"), re.DOTALL) for page in GUIDES.values()]
    assert [float(row[1]) for row in rows] == [pytest.approx(need(CONFIGS / "sd1", Case(512, 1, 16, checkpointing=True)).sum / fit.GIB, abs=0.051)] * 2


@pytest.mark.parametrize("language", GUIDES)
@pytest.mark.parametrize("family", fit.SIDES)
def test_the_cards_have_room_for_what_is_counted(family, language):
    """The second table follows from the first, as far as its rounded numbers tell."""
    needs, cards = re.search(rf"<!-- counted: {family} -->(.*?)\n\n(.*?)<!-- end", GUIDES[language].read_text("utf-8"), re.DOTALL).groups()
    numbers, batches = ([[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]] for text in (needs, cards))
    sums = {(int(batch), saving == "true", kind): float(told) for saving, batch, *row in numbers for kind, told in zip(fit.QUANTIZE, row, strict=True)}
    assert len(sums) == 24 and [row[0] for row in batches] == [f"{card} GB" for card in fit.CARDS]
    checked = 0
    for card, row in zip(fit.CARDS, batches, strict=True):
        for (saving, kind), cell in zip(product((True, False), fit.QUANTIZE), row[1:], strict=True):
            if all(abs(told - (card - fit.BESIDE)) > 0.051 for (_, *way), told in sums.items() if way == [saving, kind]):
                assert cell == fit.largest({case: told * fit.GIB for case, told in sums.items()}, card, saving, kind), (card, saving, kind)
                checked += 1
    assert checked > 24


@pytest.mark.parametrize("family, pixels, told", [("sd1", 512, 0.9), ("sdxl", 1024, 2.8)])
def test_the_guide_has_what_encoding_takes(family, pixels, told):
    assert fit.encoding(CONFIGS / family, pixels) / fit.GIB == pytest.approx(told, abs=0.05)
    assert all(re.search(rf"{told} GiB|{told} at {pixels}", page.read_text("utf-8")) for page in GUIDES.values())
