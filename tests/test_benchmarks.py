"""The benchmarks run to their end on small models and give finite figures, also on the way that a GPU takes; and how figures are judged. Seconds are not looked at."""

import gc
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
BENCHMARKS, DEMO = ROOT / "benchmarks", ROOT / "demo" / "model"
sys.path.insert(0, str(BENCHMARKS))

from common import MIB, Figure, hide_gpus, in_turn, read, turned
from ways import WAYS, Batch


def module(name: str) -> ModuleType:
    """A benchmark, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


RUN = module("run")


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a benchmark's main in this process: (command line, the module where it was loaded already) -> its figures, every number of them finite."""
    def run(line: str, loaded: ModuleType | None = None) -> dict[str, Figure]:
        name, *words = line.split()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--json", str(tmp_path / "figures.json")])
        (loaded or module(name)).main()
        figures = read(tmp_path / "figures.json")[1]
        for figure in figures:
            assert figure.ratios and all(math.isfinite(number) and number >= 0 for number in (*figure.ratios, *figure.values.values()) if number not in own_time(figure)), figure
        return {f"{figure.what} to {figure.reference}": figure for figure in figures}

    return run


def own_time(figure: Figure) -> list[float]:
    """A difference of two times may be below zero."""
    return [value for name, value in figure.values.items() if name == "the loop's own ms" and math.isfinite(value)]


@pytest.fixture
def like_a_gpu(monkeypatch):
    """`--device cpu:0` is a CPU to torch and a GPU to the benchmarks; the GPU's counters are those of this process's tensors."""
    def allocated() -> int:
        places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)
                  and tensor.device.type == "cpu" and tensor.layout == torch.strided}
        return sum(places.values())

    gc.collect()
    fakes = {"memory_allocated": allocated, "max_memory_allocated": allocated, "get_device_name": lambda: "a CPU"}
    for name in ("synchronize", "reset_peak_memory_stats", "init"):
        fakes[name] = lambda: None
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def quickly(script: ModuleType) -> ModuleType:
    """As a GPU is measured, with fewer steps: a CPU needs longer for each."""
    script.WARM, script.AGAIN, script.steps_a_turn, script.TIMESTEPS = 2, 1, lambda step, device: 2, [500]
    return script


ALL = "--ways floor loop loop-plain example hooks ours"
STEP, SMALL = f"step --model {DEMO} --pixels 32 --rounds 2 --threads 1", f"--model {DEMO} --pixels 32 --rounds 1 --threads 1"


def test_step_runs(ran):
    found = ran(f"{STEP} --checkpointing {ALL}")
    assert [figure.reference for figure in found.values()] == ["floor", "loop", "loop plain", "example", "hooks", "ours without checkpointing"]
    assert all(len(figure.ratios) == 2 for figure in found.values())


def test_step_runs_on_sdxl_as_on_a_gpu(ran, like_a_gpu, tiny_sdxl):
    found = ran(f"step --model {tiny_sdxl} --pixels 64 --rounds 1 --dtype bf16 --device cpu:0 --ways floor loop loop-plain ours", quickly(module("step")))
    peaks = {figure.reference: figure for name, figure in found.items() if name.startswith("peak memory")}
    assert [name for name in found if name.startswith("peak memory")] == [f"peak memory beside the weights, {tiny_sdxl} 64 px batch 1 bf16 to {name}" for name in ("floor", "loop", "loop plain")]
    assert [figure.bound for figure in peaks.values()] == [None, 1.0, 1.0]
    assert [found[f"step, {tiny_sdxl} 64 px batch 1 bf16 to {name}"].cells()[3] for name in ("loop", "loop plain")] == ["< 1 in every pair"] * 2


def asked(**given):
    """Options of a step: SD1.5 at 512 px, batch 1, fp32 on a CPU, and what is given."""
    options = {"family": "sd1", "model": None, "pixels": 512, "batch": 1, "rank": 8, "dtype": "fp32", "device": "cpu", "compile": False, "checkpointing": False}
    return RUN.argparse.Namespace(**options | given)


CARD = {"device": "cuda", "dtype": "bf16"}
XL = CARD | {"family": "sdxl", "pixels": 1024}


@pytest.mark.parametrize("given, bound, seconds", [
    ({}, 1.10, False), ({"batch": 4}, 1.08, False), ({"batch": 2}, None, False), ({"batch": 8}, None, False), ({"pixels": 256}, None, False), ({"rank": 16}, None, False),
    ({"dtype": "bf16"}, None, False), ({"compile": True}, None, False), ({"checkpointing": True}, None, False), ({"family": "sdxl", "pixels": 1024}, None, False),
    ({"model": Path("a")}, None, False), ({"family": "sd2"}, None, False),
    (CARD, 1.40, True), (CARD | {"dtype": "fp16"}, 1.40, True), (CARD | {"batch": 8}, 1.12, False), (CARD | {"compile": True}, 1.12, True),
    (CARD | {"compile": True, "batch": 8}, 1.12, False), (CARD | {"batch": 4}, None, False), (CARD | {"dtype": "fp32"}, None, False),
    (CARD | {"checkpointing": True}, None, False), (CARD | {"checkpointing": True, "batch": 8}, None, False), (CARD | {"rank": 4}, None, False),
    (CARD | {"model": Path("a")}, None, False), (CARD | {"pixels": 768}, None, False),
    (XL, 1.30, False), (XL | {"compile": True}, 1.06, False), (XL | {"batch": 8}, 1.12, False), (XL | {"batch": 8, "checkpointing": True}, 1.12, False),
    (XL | {"checkpointing": True}, None, False), (XL | {"pixels": 512}, None, False)])
def test_a_step_has_the_goal_of_its_kind(given, bound, seconds):
    script = module("step")
    assert (script.goal(asked(**given)), script.first_target(asked(**given))) == (bound, seconds)


def test_below_pefts_is_every_pairs_on_a_gpu_and_the_medians_on_a_cpu():
    script = module("step")
    ways = {name: script.Way(name, WAYS["floor"], seconds=seconds, peaks=[9]) for name, seconds in {"ours": [1.0, 1.0], "loop": [1.1, 1.2], "loop plain": [0.9, 2.0]}.items()}
    goals = [[(figure.reference, figure.cells()[3], figure.verdict) for figure in script.figures(asked(**given), ways)] for given in ({}, {"device": "cuda", "batch": 2})]
    assert goals[0] == [("loop", "≤ 1 (median)", "hit"), ("loop plain", "≤ 1 (median)", "hit")]
    assert goals[1] == [("loop", "< 1 in every pair", "hit"), ("loop plain", "< 1 in every pair", "missed"), ("loop", "≤ 1", "hit"), ("loop plain", "≤ 1", "hit")]


def words_of_a_step(more: str = "") -> list[str]:
    return f"step.py --model {DEMO} --pixels 32 --rounds 1 --threads 1 --ways floor loop ours {more}".split()


def test_a_way_at_another_rank_does_not_do_the_same_work(monkeypatch):
    script = module("step")
    monkeypatch.setitem(script.WAYS, "loop", lambda unet, batch, rank, loop=WAYS["loop"]: loop(unet, batch, rank + 1))
    monkeypatch.setattr(sys, "argv", words_of_a_step())
    with pytest.raises(SystemExit, match="do not do the same work.*numbers trained"):
        script.main()


@pytest.mark.parametrize("when", [1, 4])
def test_a_way_that_does_not_fit_leaves_its_figures_open(when, monkeypatch, tmp_path, like_a_gpu):
    """At its first step, or in a turn."""
    @contextmanager
    def full(unet, batch, rank, loop=WAYS["loop"]):
        with loop(unet, batch, rank) as step:
            steps = iter(range(1, 100))
            yield type(step)(lambda: refused() if next(steps) >= when else step(), step.trained)

    def refused():
        raise torch.OutOfMemoryError

    script, file = quickly(module("step")), tmp_path / "figures.json"
    monkeypatch.setitem(script.WAYS, "loop", full)
    monkeypatch.setattr(sys, "argv", words_of_a_step(f"--device cpu:0 --dtype bf16 --json {file}"))
    script.main()
    found = {(figure.what.split(",")[0], figure.reference): figure for figure in read(file)[1]}
    assert {name: (figure.ratios, figure.verdict, figure.note) for name, figure in found.items() if name[1] == "loop"} == {
        (what, "loop"): ([], "open", "loop: does not fit") for what in ("step", "peak memory beside the weights")}
    assert len(found) == 4 and all(found[what, "floor"].ratios for what in ("step", "peak memory beside the weights"))


@pytest.mark.long
def test_step_runs_compiled_as_on_a_gpu(ran, like_a_gpu, tiny_sd1, monkeypatch):
    """By a compiler that needs no C++: what is compiled and how often it is, is the same."""
    monkeypatch.setattr("hcpdiff.train.compiled.BACKEND", "aot_eager")
    found = ran(f"step --model {tiny_sd1} --pixels 64 --rounds 1 --dtype bf16 --device cpu:0 --compile --ways floor loop ours", quickly(module("step")))
    assert [figure.reference for figure in found.values()] == ["floor", "loop", "ours", "floor", "loop"]


def test_the_frozen_models_backward_pass_goes_as_far_when_it_is_compiled(monkeypatch):
    """A compiler leaves out what nothing needs, such as the backward pass of the first block, whose layers are the first that would be trained."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch.utils._python_dispatch import TorchDispatchMode

    step, products = module("step"), []

    def counted(graph, inputs):
        own = sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)
        return make_boxed_func(lambda *values: (products.append(own), graph(*values))[1])

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.append(func is torch.ops.aten.mm.default)
            return func(*args, **kwargs or {})

    unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(32, 32), norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=2).requires_grad_(False).train()
    batch = Batch(torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 7, 32), torch.randn(1, 4, 8, 8))
    monkeypatch.setattr("hcpdiff.families.sd.StableDiffusion.blocks", frozenset({"BasicTransformerBlock"}))
    monkeypatch.setattr("hcpdiff.train.compiled.BACKEND", aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=counted))
    counts = []
    for batch.compiled in (False, True):
        own = step.sharing(unet)
        if batch.compiled:
            step.compile_blocks(own, step.argparse.Namespace(family="tiny", batch=1, pixels=64))
        anchor = torch.zeros((), requires_grad=True)
        with WAYS["floor"](own, batch, 8):
            loss = batch.loss(own)
            products.clear()
            if batch.compiled:
                loss.backward()
            else:
                with Products():
                    loss.backward()
        counts.append(sum(products))
    assert counts[0] == counts[1] > 20


def test_layers_runs(ran, like_a_gpu):
    found = ran("layers --shape 16 32 64 --shape 8 16 16 --rounds 2 --threads 1")
    assert len(found) == 6 and "layer, 8 tokens, 16 to 16, fp32 to merged" in found
    assert [figure.reference for figure in ran("layers --shape 16 32 64 --rounds 1 --dtype bf16 --device cpu:0").values()] == ["floor", "peft", "peft plain"]


@pytest.mark.parametrize("name, first, each", [("ours", 2, 0), ("peft", 2, 2), ("peft plain", 0, 0)])
def test_what_a_step_does_once_is_done_once_in_a_turn(name, first, each):
    """For both: our copies of the factors (two, of flat buffers), and the casts that autocast keeps for peft. In each call peft casts two gradients back."""
    layers, x, g = module("layers"), torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, 32, dtype=torch.bfloat16)
    way = layers.ways(torch.nn.Linear(16, 32, dtype=torch.bfloat16).requires_grad_(False), 4)[name]
    for times in (1, 3):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            way.turn(x, g, times)
        wanted = [[64], [128]] if name == "ours" else [[4, 16], [32, 4]]
        assert sum(event.name == "aten::copy_" and event.input_shapes[0] in wanted for event in seen.events()) == first + each * times


def test_caching_runs(ran, like_a_gpu):
    found = ran(f"caching --model {DEMO} --pixels 64 --rounds 1 --images 2 --kinds 2-jpg --device cpu:0")
    assert len(found) == 3 and list(found)[-1] == "latents cached, 64 px, 2-jpg, second start (time) to vae.encode alone"


@pytest.mark.long
def test_quantized_runs(ran):
    assert len(ran(f"quantized {SMALL} --checkpointing")) == 9


def test_quantized_runs_as_on_a_gpu(ran, like_a_gpu, tiny_sd1):
    found = ran(f"quantized --model {tiny_sd1} --pixels 32 --rounds 1 --device cpu:0", quickly(module("quantized")))
    name = tiny_sd1.name
    assert len(found) == 11 and found[f"bytes of the UNet in nf4, {name} to bf16"].median < found[f"bytes of the UNet in int8, {name} to bf16"].median < 1


def test_the_peak_of_a_step_is_its_own(monkeypatch):
    """Above what there is between steps, and not that of a step before, which may be higher."""
    quantized, there, peak, above = module("quantized"), 7 * MIB, [0], iter([9 * MIB] * 2 + [4 * MIB])
    fakes = {"reset_peak_memory_stats": lambda: peak.append(there), "memory_allocated": lambda: there, "max_memory_allocated": lambda: peak[-1]}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert quantized.peak_of(lambda: peak.append(max(peak[-1], there + next(above)))) == 4


def test_drawing_runs(ran):
    found = ran(f"drawing {SMALL} --steps 1 --pictures 1")
    names = {"ours s", "theirs s", "ours CPU s", "theirs CPU s", "CPU ratio"}
    assert [set(figure.values) for figure in found.values()] == [names, names, {"by the LoRA"}]
    *_, apart = found.values()
    assert apart.verdict == "hit" and apart.values["by the LoRA"] > 3


def test_drawing_refuses_a_lora_that_changes_nothing(ran, monkeypatch):
    drawing = module("drawing")
    monkeypatch.setattr(drawing, "STRENGTH", 0.01)
    with pytest.raises(SystemExit, match="the LoRA changes diffusers' own pictures by 1.0 of 255 at most"):
        ran(f"drawing {SMALL} --steps 1 --pictures 1", drawing)


def test_loop_runs(ran):
    (found,) = ran("loop --tiny --pixels 64 --rounds 2 --block 1 --threads 1").values()
    assert len(found.ratios) == 2 and found.reference == "its own bare step"


@pytest.mark.long
def test_memory_runs(ran):
    (found,) = ran(f"memory {SMALL}").values()
    assert {"weights MiB", "activations MiB", "inputs MiB", "adapters MiB", "peak while training MiB"} <= found.values.keys()


def test_memory_runs_as_on_a_gpu(ran, like_a_gpu):
    memory = module("memory")
    memory.child = lambda args, what: getattr(memory, what)(args)  # in this process, which has the counters
    (found,) = ran(f"memory {SMALL} --dtype bf16 --device cpu:0", memory).values()
    assert found.values["weights MiB"] > 10 and "peak while on the GPU MiB" in found.values


def test_data_scale_runs_simulated(ran):
    assert list(ran("data_scale --simulate --images 40")) == [f"{what} to {than}" for what, than in (
        ("index of simulated 40 images", "a minute for 100,000"), ("memory, simulated 40 images", "1 KB an image"), ("second start, simulated 40 images", "a minute for 100,000"))]


def test_data_scale_runs_on_a_folder(tmp_path, monkeypatch, capsys):
    data = module("data_scale")
    data.make_folder(tmp_path, 60)
    monkeypatch.setattr(sys, "argv", ["data_scale.py", "--one", str(tmp_path), "--images", "60"])
    data.main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = data.figures([row, row | {"images": 120}], False)
    assert row["images"] == 60 and [figure.what for figure in found] == [*(f"{what} {count} images" for count in (60, 120) for what in ("index of", "memory,", "fingerprint of")), "index an image at 120"]
    assert all(math.isfinite(figure.median) for figure in found)
    assert [len(figure.ratios) for figure in data.together([found, found])] == [2] * len(found)  # of two rounds
    memory = found[1]
    assert memory.values["fingerprint peak bytes"] > 0 and memory.median * 1024 >= max(memory.values["index peak bytes"], memory.values["fingerprint peak bytes"])


@pytest.mark.long
def test_start_runs(ran):
    found = ran("start --tiny --rounds 1 --threads 1")
    assert list(found) == ["until the first step, the demo model, fp32 to imports and from_pretrained"]


@pytest.mark.parametrize("how", ["", "late", "loop"])
def test_trainer_step_runs(how, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer_step.py", "--steps", "2", *how.split()])
    module("trainer_step").main()
    assert re.fullmatch(r"\d+\.\d ms a step\n", capsys.readouterr().out)


def test_make_full_size_gives_a_model_that_can_be_trained(tmp_path, monkeypatch):
    from hcpdiff.families import detect

    monkeypatch.setattr(sys, "argv", ["make_full_size.py", str(tmp_path / "model"), "--narrow", "10"])
    module("make_full_size").main()
    models = detect(tmp_path / "model").load(tmp_path / "model", "m", None, torch.float32)
    assert set(models.modules) == {"unet", "vae", "text_encoder"} and torch.get_default_dtype() == torch.float32
    assert models.unet.config.cross_attention_dim == models.text_encoder.config.hidden_size == 72


def test_tests_of_a_gpu_are_counted(ran, tmp_path):
    (tmp_path / "test_some.py").write_text("""
import pytest

@pytest.fixture
def torn():
    yield
    raise RuntimeError

def test_a(): pass
def test_b(): assert 0
def test_c(torn): pass
@pytest.mark.skip
def test_d(): pass
@pytest.mark.long
def test_e(): pass
""")
    (found,) = ran(f"gpu_tests --tests {tmp_path / 'test_some.py'}").values()
    assert (found.ratios, found.verdict, found.values["passed"], found.values["skipped"]) == ([2], "missed", 1, 1)
    (found,) = ran(f"gpu_tests --tests {tmp_path / 'test_some.py'} --long").values()
    assert (found.verdict, found.values["passed"]) == ("hit", 1)


# ---- all of them one after the other ----------------------------------------------------------------------------------------------------------------

FIGURE = "json.dump({{'hardware': 'a machine, 2026-11-01', 'figures': [{{'what': '{}', 'reference': 'r', 'ratios': [1.0]}}]}}, open(sys.argv[-1], 'w'))"  # --json comes last
SCRIPT = "import pathlib, sys; sys.path.insert(0, {place!r}); import run; run.CPU = {{'small': {commands!r}}}; sys.argv = ['run.py', '--keep', {keep!r}]; run.main()"


def lines_of(run: ModuleType, monkeypatch, words: str, commands: list[str]) -> None:
    monkeypatch.setattr(run, "CPU", {"small": commands})
    monkeypatch.setattr(sys, "argv", ["run.py", *words.split()])
    before = signal.getsignal(signal.SIGTERM)
    try:
        run.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cut_call_is_gone_on_with_and_written_into_the_page(tmp_path, monkeypatch, capfd):
    keep, page, slow = tmp_path / "kept", tmp_path / "performance.md", tmp_path / "slow.py"
    slow.write_text("import json, sys, time\nprint('begun')\ntime.sleep(3)\n" + FIGURE.format("slow"))
    commands = ["layers.py --shape 16 32 64 --rounds 1", str(slow)]
    first = subprocess.Popen([sys.executable, "-c", SCRIPT.format(place=str(BENCHMARKS), commands=commands, keep=str(keep))], stdout=subprocess.DEVNULL)
    one, two = (RUN.place_of(command, RUN.argparse.Namespace(device="cpu", rounds=None), keep) for command in commands)
    while not (two.with_suffix(".log").is_file() and two.with_suffix(".log").read_text()) and first.poll() is None:
        time.sleep(0.02)
    first.terminate()
    assert first.wait() == 128 + signal.SIGTERM and one.is_file() and not two.is_file()
    made = one.stat().st_mtime_ns
    shutil.copy(ROOT / "docs" / "performance.md", page)
    monkeypatch.setattr(RUN, "PAGE", page)
    lines_of(RUN, monkeypatch, f"--keep {keep} --write", commands)
    assert f"measured before: {one}" in capfd.readouterr().out and one.stat().st_mtime_ns == made
    before, after = (path.read_text("utf-8").partition("<!-- measured: cpu -->") for path in (ROOT / "docs" / "performance.md", page))
    table, _, rest = after[2].partition("<!-- end: cpu -->")
    assert after[0] == before[0] and rest == before[2].partition("<!-- end: cpu -->")[2]
    head, line = ["| what", "against"], ["| ---", "---"]
    assert [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ")] == [
        head, line, *(["| layer, 16 tokens, 32 to 64, fp32", way] for way in ("floor", "peft", "merged")), head, line, ["| slow", "r"]]
    assert len(re.findall("^### ", table, re.M)) == 2 and "### a machine, 2026-11-01\n" in table
    assert "layer, 16 tokens" in one.with_suffix(".log").read_text("utf-8")


def test_when_its_time_is_over_it_ends_with_the_table_of_what_is_there(tmp_path, monkeypatch, capsys):
    """What the benchmark that runs has started ends too."""
    quick, slow = tmp_path / "quick.py", tmp_path / "slow.py"
    quick.write_text("import json, sys\n" + FIGURE.format("quick"))
    slow.write_text(f"import subprocess, sys\nchild = subprocess.Popen(['sleep', '300'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\nprint('waiting')\nchild.wait()")
    with pytest.raises(SystemExit, match="gave no figures"):
        lines_of(RUN, monkeypatch, f"--keep {tmp_path / 'kept'} --seconds 5", [str(quick), str(slow), "layers.py"])
    printed = capsys.readouterr().out
    assert "| quick | r | 1 |" in printed and "waiting" in printed and f"{slow} was not done in time" in printed and "no time left" in printed
    until, pid = time.monotonic() + 30, int((tmp_path / "pid").read_text())
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process has not ended. One that nobody asks for its exit status, as in a container whose first process does not, has."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_an_ended_process_that_nobody_waits_for_does_not_run():
    with subprocess.Popen(["sleep", "300"]) as program:
        assert runs(program.pid)
        program.kill()
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
        os.kill(program.pid, 0)
        assert not runs(program.pid)


def test_a_table_says_whose_code_its_figures_are_of_where_that_is_not_this_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RUN, "code_of", lambda root: "abc1234")
    scripts = []
    for name in ("one", "two", "old"):
        scripts.append(tmp_path / f"{name}.py")
        scripts[-1].write_text("import json, sys\n" + FIGURE.format(name))
    keep, args = tmp_path / "kept", RUN.argparse.Namespace(device="cpu", rounds=None)
    keep.mkdir()
    for script, code in ((scripts[1], {"code": "def5678+9a8b7c6"}), (scripts[2], {})):
        kept = {"hardware": "a machine, 2026-10-30", "figures": [{"what": script.stem, "reference": "r", "ratios": [1.0]}]}
        RUN.place_of(str(script), args, keep).write_text(json.dumps(kept | code))
    lines_of(RUN, monkeypatch, f"--keep {keep}", [str(script) for script in scripts])
    assert "### a machine, 2026-11-01, 2026-10-30, code of abc1234 and def5678+9a8b7c6 and unknown\n" in capsys.readouterr().out
    lines_of(RUN, monkeypatch, f"--keep {keep}", [str(scripts[0])])
    assert "### a machine, 2026-11-01\n" in capsys.readouterr().out


def test_code_is_a_commit_and_what_was_changed_since(tmp_path):
    assert RUN.code_of(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "benchmarks").mkdir()
    file, page = tmp_path / "benchmarks" / "a.py", tmp_path / "page.md"
    file.write_text("1\n"), page.write_text("1\n")
    for words in ("init -q", "add .", "commit -qm a"):
        subprocess.run([*git, *words.split()], check=True)
    clean = RUN.code_of(tmp_path)
    page.write_text("2\n")
    assert re.fullmatch("[0-9a-f]{7,}", clean) and RUN.code_of(tmp_path) == clean
    codes = {clean}
    for text in ("2\n", "3\n"):
        file.write_text(text)
        codes.add(RUN.code_of(tmp_path))
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    for name, text in (("b.py", "1\n"), ("b.py", "2\n"), ("c.py", "2\n"), ("it's ü.py", "2\n")):  # files that git does not know yet
        (tmp_path / "benchmarks" / name).write_text(text)
        codes.add(RUN.code_of(tmp_path))
    (tmp_path / "benchmarks" / "a.pyc").write_text("1\n"), (tmp_path / "new.md").write_text("1\n")
    assert len(codes) == 7 and RUN.code_of(tmp_path) in codes and all(code.partition("+")[0] == clean for code in codes)


def test_what_tells_most_comes_first_on_a_gpu_and_nothing_twice():
    args = RUN.argparse.Namespace(device="cuda", only=None)
    assert RUN.chosen(args)[: len(RUN.CUDA["first"])] == RUN.CUDA["first"] and len(set(RUN.chosen(args))) == len(RUN.chosen(args))
    assert {command for commands in RUN.CUDA.values() for command in commands} == set(RUN.chosen(args))


@pytest.mark.parametrize("command", sorted({command for table in (RUN.CPU, RUN.CUDA) for commands in table.values() for command in commands}))
def test_every_command_line_is_one(command, monkeypatch, capsys):
    """Up to the work: options that a benchmark does not have would show only on the machine where it runs."""
    name, *words = command.split()
    script = module(name.removesuffix(".py"))
    seen = []
    for work in ("measure", "child", "make", "make_folder"):
        if hasattr(script, work):
            monkeypatch.setattr(script, work, lambda *given: seen.append(given) or (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(script.subprocess if hasattr(script, "subprocess") else subprocess, "run", lambda *given, **more: seen.append(given) or (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", [name, *words, "--device", "cpu"])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert seen


# ---- how figures are judged -------------------------------------------------------------------------------------------------------------------------

def step(batch: int, seconds: float, more: str = "", family: str = "sd1 512 px") -> Figure:
    return Figure(f"step, {family} batch {batch} bf16{more}", "floor", [1.1], 1.4, values={"ours s": seconds, "floor s": seconds / 1.1})


@pytest.mark.parametrize("ratios, every, verdict", [([0.8, 0.9, 1.2], False, "hit"), ([0.8, 0.9, 1.2], True, "missed"), ([0.8, 0.9, 0.99], True, "hit"),
                                                    ([0.8, 0.9, 1.0], True, "missed"), ([1.1, 0.9, 1.2], False, "missed"), ([], True, "open")])
def test_a_figure_is_judged_by_its_median_or_by_every_pair(ratios, every, verdict):
    figure = Figure("step", "loop", ratios, 1.0, every=every, note="it does not fit")
    assert figure.verdict == verdict and figure.cells()[3] == ("< 1 in every pair" if every else "≤ 1 (median)")
    assert ratios or figure.cells()[2] == "it does not fit"


def test_what_should_be_at_least_something_is_judged_from_below():
    judged = [Figure("x", "y", ratios, 1.5, at_least=True, every=every).verdict for ratios, every in (([1.4, 1.6, 1.7], False), ([1.4, 1.6], True), ([1.6], True))]
    assert judged == ["hit", "missed", "hit"]
    assert Figure("x", "y", [3.0]).verdict == ""


def test_images_a_second_have_a_goal_where_the_issue_has_one():
    steps = [step(1, 0.09), step(8, 0.16), step(1, 0.04, " compiled"), step(8, 0.1, " compiled"), step(1, 1.0, family="sdxl 1024 px"), step(8, 4.0, family="sdxl 1024 px")]
    assert [(figure.what.removeprefix("images a second, "), round(figure.median, 6), figure.bound) for figure in RUN.derived(steps)] == [
        ("sd1 512 px batch 8 bf16", 4.5, 4.0), ("sd1 512 px batch 8 bf16 compiled", 3.2, None), ("sdxl 1024 px batch 8 bf16", 2.0, None)]


@pytest.mark.parametrize("given, lacking", [([step(1, 0.09)], "batch 8"), ([step(8, 0.16)], "batch 1"),
                                            ([step(1, 0.09), Figure("step, sd1 512 px batch 8 bf16", "floor", [], 1.12, note="ours: does not fit")], "batch 8")])
def test_a_figure_whose_partner_is_missing_is_open_and_names_it(given, lacking):
    (found,) = RUN.derived(given)
    assert found.verdict == "open" and lacking in found.note
    assert not RUN.derived([step(1, 1.0, family="sdxl 1024 px"), Figure("step, sd1 512 px batch 4 fp32", "floor", [1.0], 1.08, values={"ours s": 50.0})])


def test_every_work_begins_once_and_has_a_time_for_each_round():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, 2, warm=1, each=2)
    assert calls == [*"ccaabb", *"aabbcc", *"bbccaa"] and {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 2)
    assert turned("abc", 4) == ["b", "c", "a"]


def test_a_benchmark_without_a_gpu_in_its_command_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    hide_gpus(["--device", "cuda", "--rounds", "3"])
    hide_gpus(["--rounds=3", "--device=cuda"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    hide_gpus(["--pixels", "64"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_all_ways_train_as_many_numbers():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "demo" / "model" / "unet")).requires_grad_(False)
        batch = Batch(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, 64), torch.zeros(2, 4, 8, 8))
    trained = {}
    for name, way in WAYS.items():
        with way(unet, batch, 8) as step:
            trained[name] = step.trained
    assert trained.pop("floor") == 0 and len(set(trained.values())) == 1 and trained["ours"] > 10_000
