"""What a run does in its steps, in exact counts: calls of the VAE and of the text encoder, images decoded, values of tensors that are looked at."""

from collections import Counter
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from test_run import CONFIG, train  # noqa: F401 - the fixture
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.data import image
from hcpdiff.train.parallel import Parallel
from hcpdiff.train.run import Run
from hcpdiff.train.trainer import Hook, Trainer

STEPS, IMAGES = 6, 3
CAPTIONED = "data.one.source.a.caption_file=images"


class Looks(TorchDispatchMode):
    """Counts where a tensor's value is asked for: there a host waits for its device."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found, self.calls = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.found.update(name for name in self.OPERATIONS if name in str(func))
        return func(*args, **kwargs or {})


@pytest.fixture
def counted(monkeypatch, tmp_path, tiny_sd1, train):  # noqa: F811
    """counted('key=value', ...) -> (calls before the first step, calls in the steps, looks at values in the steps) of a run of STEPS steps."""
    calls = Counter()

    def spy(owner, name, what):
        real = getattr(owner, name)

        def called(*args, **keys):
            calls[what] += 1
            return real(*args, **keys)

        monkeypatch.setattr(owner, name, called)

    spy(AutoencoderKL, "encode", "vae")
    spy(CLIPTextModel, "forward", "text")
    spy(image, "decode", "decoded")
    numbers = iter(range(9))

    def go(*overrides):
        calls.clear()
        (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
        for i in range(IMAGES):
            (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i}", "utf-8")
        run = Counting(load("cfg.yaml", [f"exp_dir=counted{next(numbers)}", f"train.train_steps={STEPS}", CAPTIONED, *overrides], RunConfig), Parallel())
        run.calls = calls
        run.train()
        return run.before, calls - run.before, run.looks

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
        self.looks = Looks()
        return super().train()

    def _build_trainer(self):
        trainer = super()._build_trainer()
        step = trainer._step

        def watched(*args):
            with self.looks:
                step(*args)

        trainer._step = watched
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


@pytest.mark.parametrize("learns", [(), (TEXT_LORA,)])
def test_no_step_of_a_real_run_looks_at_a_value(counted, monkeypatch, learns):
    """As beside a GPU; the whole step, with the UNet's, the text encoder's, the objective's and the optimizer's own code. AdamW's counters are the host's own."""
    monkeypatch.setattr("hcpdiff.train.run.Trainer", partial(Trainer, lag=True))
    looks = counted(*learns)[2]
    assert looks.calls > 1000 and not looks.found
    with looks:
        float(torch.ones(()))
    assert looks.found == {"_local_scalar_dense": 1}
