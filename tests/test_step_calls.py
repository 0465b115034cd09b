"""What a run does in its steps, in exact counts: calls of the VAE and of the text encoder, images decoded, values of tensors that are looked at."""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from test_run import CONFIG, train  # noqa: F401 - the fixture
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.data import image
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run
from hcpdiff.train.trainer import Hook, Trainer
from hcpdiff.train.watch import Watch

STEPS, IMAGES = 6, 3
CAPTIONED = "data.one.source.a.caption_file=images"


class Looks(TorchDispatchMode):
    """Counts where a tensor's value is asked for, or a tensor is made of numbers of the host: there a host waits for its device."""

    OPERATIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh", "_unique", "_unique2", "unique_dim", "unique_consecutive"}

    def __init__(self):
        super().__init__()
        self.found, self.calls = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        masked = name.startswith(("index", "_index")) and any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in _parts(args))
        self.found.update([name] * (name in self.OPERATIONS) + ["mask"] * masked)
        return func(*args, **kwargs or {})


def _parts(args):
    """The tensors that are indices: the second argument's."""
    return args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()


class Fetches(TorchFunctionMode):
    """Counts where a tensor's values come to the host."""

    NAMES = {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__"}

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.found.update([name] * (name in self.NAMES))
        return func(*args, **kwargs or {})


@pytest.fixture
def counted(monkeypatch, tmp_path, tiny_sd1, train):  # noqa: F811
    """counted('key=value', ..., model=folder) -> (calls before the first step, calls in the steps, the run with its looks and fetches in the steps), of STEPS steps."""
    calls = Counter()

    def spy(owner, name, what):
        real = getattr(owner, name)

        def called(*args, **keys):
            calls[what] += 1
            return real(*args, **keys)

        monkeypatch.setattr(owner, name, called)

    spy(AutoencoderKL, "encode", "vae")
    spy(CLIPTextModel, "forward", "text")
    spy(CLIPTextModelWithProjection, "forward", "text_2")
    spy(image, "decode", "decoded")
    numbers = iter(range(9))

    def go(*overrides, model=tiny_sd1):
        calls.clear()
        (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
        for i in range(IMAGES):
            (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i}", "utf-8")
        run = Counting(load("cfg.yaml", [f"exp_dir=counted{next(numbers)}", f"train.train_steps={STEPS}", CAPTIONED, *overrides], RunConfig), Parallel())
        run.calls = calls
        run.train()
        return run.before, calls - run.before, run

    return go


class Counting(Run):
    """Notes what was called before the first step, and looks at what is looked at in the steps."""

    def _hooks(self):
        counting, note = super()._hooks(), Hook()
        note.on_epoch_begin = self._begin
        return [*counting, note]

    def _begin(self, trainer, epoch):
        if trainer.state.step == 0:  # the hook that encodes prompts ahead comes before
            self.before = Counter(self.calls)

    def train(self):
        self.looks, self.fetches = Looks(), Fetches()
        return super().train()

    def _build_trainer(self):
        trainer = super()._build_trainer()
        step, tell = trainer._step, trainer._tell

        def watched(*args):
            with self.looks, self.fetches:
                step(*args)

        def told(event, *args):
            with self.fetches if event == "on_step_end" else nullcontext():
                tell(event, *args)

        trainer._step, trainer._tell = watched, told
        return trainer


TEXT_LORA = "lora_text_encoder=[{lr: 1.0, rank: 2, layers: ['re:.*self_attn$']}]"


def test_with_caches_a_step_calls_no_vae_and_no_text_encoder_and_decodes_no_image(counted):
    before, steps, _ = counted()
    assert before == {"vae": IMAGES, "decoded": IMAGES, "text": IMAGES}
    assert not steps, "three epochs ask for the same prompts, which are encoded ahead"


@pytest.mark.parametrize("overrides,expected", [
    ((TEXT_LORA,), {"text": STEPS}),
    ((TEXT_LORA, "train.gradient_accumulation_steps=2"), {"text": 2 * STEPS}),
])
def test_what_learns_is_called_once_for_each_batch(counted, overrides, expected):
    assert counted(*overrides)[1] == expected


def test_what_is_not_cached_is_decoded_once_for_each_sample_and_encoded_once_for_each_batch(counted):
    before, steps, _ = counted("data.one.cache_latents=none", "train.workers=0")
    samples = IMAGES * STEPS // 2  # three epochs; batches are made ahead, so some before the first step
    assert before + steps == {"vae": STEPS, "text": IMAGES, "decoded": samples}
    assert steps["vae"] == STEPS


def test_a_second_start_decodes_nothing_and_encodes_no_latent(counted):
    disk = "data.one.cache_latents=disk", "data.one.cache_dir=cache"
    first, second = counted(*disk)[0], counted(*disk)[0]
    assert first == {"vae": IMAGES, "decoded": IMAGES, "text": IMAGES}
    assert second == {"text": IMAGES}


def test_both_encoders_of_sdxl_run_before_the_first_step_only(counted, tiny_sdxl):
    before, steps, _ = counted("train.train_steps=2", model=tiny_sdxl)
    assert before["text_2"] == IMAGES and before["text"] == 2 * IMAGES, "the second one has a text model of the first one's kind inside"
    assert not steps


LATE = "train.log_step=1", "train.save_step=null"  # a log line each step, and nothing that has to be exact


@pytest.fixture
def late(monkeypatch):
    """The host learns a step's numbers as beside a GPU."""
    monkeypatch.setattr("hcpdiff.train.run.Trainer", partial(Trainer, lag=True))


@pytest.mark.parametrize("learns,made", [((), {}), ((TEXT_LORA,), {"lift_fresh": STEPS})])
def test_no_step_of_a_real_run_looks_at_a_value(counted, late, learns, made):
    """As beside a GPU; the whole step, with the UNet's, the text encoder's, the objective's and the optimizer's own code. Ids of tokens are made on the CPU, and sent."""
    run = counted(*LATE, *learns)[2]
    assert run.looks.calls > 1000 and run.looks.found == made
    run.looks.found.clear()
    with run.looks:
        ones = torch.ones(2)
        float(ones[0]), torch.equal(ones, ones), torch.as_tensor(0.5), ones[ones > 2]
    assert run.looks.found == {"_local_scalar_dense": 1, "equal": 1, "lift_fresh": 1, "mask": 1}
    assert run.fetches.found == {"cpu": STEPS, "numpy": STEPS}, "one for each step, in Watch.read"
    with run.fetches:
        float(ones[0]), bool(ones[0]), ones.tolist(), ones[0].item()
    assert run.fetches.found - Counter(cpu=STEPS, numpy=STEPS) == {"__float__": 1, "__bool__": 1, "tolist": 1, "item": 1}


def test_the_host_reads_each_steps_numbers_once_and_only_after_the_next_backward(counted, late, monkeypatch):
    """No log line waits for the device: it comes a step later. Of the last step there is no other way."""
    events = []
    for owner, name in ((Trainer, "backward"), (Watch, "report"), (Watch, "read")):
        monkeypatch.setattr(owner, name, lambda *args, real=getattr(owner, name), name=name: events.append(name) or real(*args))
    counted(*LATE, "train.train_steps=4")
    assert events == ["backward", "report", *["backward", "read", "report"] * 3, "read"]
