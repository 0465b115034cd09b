"""Stable Diffusion XL: text and sizes as diffusers has them, the step against one written out here, groups over two encoders, a base model's own schedule."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from test_step_reference import make_batch
from tiny import make_sdxl_unet, make_text_encoder, make_text_encoder_2

from hcpdiff.config.schema import BucketConfig, DatasetConfig, LoraGroup, ModelConfig, TrainConfig
from hcpdiff.diffusion.objective import DiscreteObjective
from hcpdiff.errors import ConfigError, LayerMatchError
from hcpdiff.families import detect, quick_faults
from hcpdiff.families.base import Models
from hcpdiff.families.sdxl import StableDiffusionXL
from hcpdiff.loss import make_loss
from hcpdiff.train.base import BaseModel
from hcpdiff.train.step import DenoisingStep
from hcpdiff.trainables.lora import lay_groups
from hcpdiff.vis import embeddings, encode
from hcpdiff.vis.prompt import parse

FAMILY = StableDiffusionXL()
TEXTS = ["a cat", "two dogs in a field"]


@pytest.fixture(scope="module")
def models(tiny_sdxl):
    assert isinstance(detect(tiny_sdxl), StableDiffusionXL) and not quick_faults(str(tiny_sdxl))
    return FAMILY.load(tiny_sdxl, "tiny")


@pytest.fixture(scope="module")
def theirs(models):
    """diffusers' pipeline over the same modules."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**models.modules, **models.tokenizers, scheduler=EulerDiscreteScheduler(), add_watermarker=False)


def encoded(models, prompts, repeats=1, clip_skip=0):
    with torch.no_grad():
        return FAMILY.encode_text(models, FAMILY.tokenize(models, prompts, repeats), clip_skip)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_text_is_encoded_as_diffusers_does(models, theirs, clip_skip):
    ours = encoded(models, TEXTS, clip_skip=clip_skip)
    with torch.no_grad():
        hidden, _, pooled, _ = theirs.encode_prompt(TEXTS, clip_skip=clip_skip or None)
    assert ours.hidden.shape == (2, 77, 80) and torch.equal(ours.hidden, hidden) and torch.equal(ours.pooled, pooled)
    assert FAMILY.most_clip_skip(models) == 1  # of three layers the last is never read, and one is left


def test_a_long_prompt_is_chunks_side_by_side_and_pooled_by_the_first(models):
    long = " ".join(["cat"] * 75)
    both, first, second = encoded(models, [f"{long} dog"], 2), encoded(models, [long]), encoded(models, ["dog"])
    torch.testing.assert_close(both.hidden, torch.cat([first.hidden, second.hidden], dim=1))
    torch.testing.assert_close(both.pooled, first.pooled)


def test_prompt_weights_act_on_each_encoder_by_itself_and_not_on_pooled(models):
    plain, got = encoded(models, ["a cat"]), encode.encode(models, parse("a {cat:1.5}"), 1)
    weights = torch.ones(1, 1, 77)
    weights[..., 2] = 1.5
    for part, own in zip(got.hidden.split([32, 48], -1), plain.hidden.split([32, 48], -1)):
        torch.testing.assert_close(part, encode.weigh(own, weights))
    assert torch.equal(got.pooled, plain.pooled)


def test_an_empty_negative_prompt_is_zeros_where_the_model_says_so(models):
    empty = encode.encode_negative(models, parse(""), 1)
    assert models.extra["zero_negative"] and not empty.hidden.any() and not empty.pooled.any()
    assert torch.equal(encode.encode_negative(models, parse("bad"), 1).hidden, encoded(models, ["bad"]).hidden) and encode.encode(models, parse(""), 1).hidden.any()


def test_an_embedding_of_two_encoders_means_its_vectors_and_leaves_pooled_at_the_eos(models, tmp_path):
    models = Models(FAMILY, models.folder, "tiny", copy.deepcopy({name: models.modules[name] for name in ("text_encoder", "text_encoder_2")}), models.tokenizers, {})
    want = encoded(models, ["a red car, city"])
    ids = models.tokenizer("red car", add_special_tokens=False).input_ids
    pair = {key: models.modules[name].get_input_embeddings().weight[ids].detach().clone() for key, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))}
    save_file(pair, tmp_path / "vehicle.safetensors")
    save_file({"clip_l": pair["clip_l"], "clip_g": pair["clip_g"][:1].clone()}, tmp_path / "uneven.safetensors")
    library = embeddings.find(tmp_path)
    words = encode.Words(library.pattern(), embeddings.add_words(models, embeddings.used(library, ["a vehicle"])))
    got = encode.encode(models, parse("a vehicle, city"), 1, words)
    assert torch.equal(got.hidden, want.hidden) and torch.equal(got.pooled, want.pooled)
    with pytest.raises(ConfigError, match="2 vectors in clip_l and 1 vectors in clip_g"):
        embeddings.add_words(models, embeddings.used(library, ["uneven"]))


def group(*layers, **keys):
    return LoraGroup(**{"lr": 1e-3, "rank": 2, "layers": list(layers), **keys})


def fresh() -> Models:
    torch.manual_seed(0)
    return Models(FAMILY, None, "tiny", {"text_encoder": make_text_encoder(), "text_encoder_2": make_text_encoder_2()}, {}, {})


def test_a_pattern_is_for_one_encoder_or_for_both_and_each_has_its_rate():
    groups = [group("re:.*self_attn$"), group(r"re:te2\..*mlp$", lr=5e-4, rank=3), group("te1.encoder.layers.0.mlp", lr=2e-4)]
    first, second = lay_groups(fresh(), "lora_text_encoder", groups, 0)
    assert (len(first.adapters), len(second.adapters)) == (3 * 4 + 2, 4 * 4 + 4 * 2)
    assert [(g.name, g.lr, len(g.parameters)) for g in first.param_groups() + second.param_groups()] == [
        ("text_encoder-0", 1e-3, 24), ("text_encoder-2", 2e-4, 4), ("text_encoder_2-0", 1e-3, 32), ("text_encoder_2-1", 5e-4, 16)]
    assert all(path.startswith("text_model.encoder.") for trainable in (first, second) for path in trainable.export())
    path = "text_model.encoder.layers.0.self_attn.k_proj"
    draws = [trainable.export()[path].down[0, :32] * width**0.5 for trainable, width in ((first, 32), (second, 48))]
    assert not torch.allclose(*draws)  # of its own generator each


def test_an_encoder_that_no_pattern_names_is_not_trained():
    (only,) = lay_groups(fresh(), "lora_text_encoder", [group("te2")], 0)
    assert only.component.file_stem == "text_encoder_2" and "text_projection" in only.export() and len(only.adapters) == 4 * 6 + 1


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_layers_that_are_not_read_are_those_without_a_gradient_and_are_told(tiny_sdxl, clip_skip):
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(tiny_sdxl), clip_skip=clip_skip))
    models = base.load(torch.float32, ())
    trainables = lay_groups(models, "lora_text_encoder", [LoraGroup(lr=1.0, rank=2, layers=["re:.*mlp$"])], 0)
    cond = FAMILY.encode_text(models, FAMILY.tokenize(models, TEXTS, 1), clip_skip)
    (cond.hidden.square().sum() + cond.pooled.square().sum()).backward()
    dead = {t.component.name: [path for path, lora in t.adapters.items() if lora.up.grad is None or not lora.up.grad.any()] for t in trainables}
    assert len(dead["text_encoder"]) == 2 * (1 + clip_skip) and not dead["text_encoder_2"]
    assert base.unread_layers(trainables) == [f"note: {len(dead['text_encoder'])} of 6 LoRA layers of the text_encoder learn nothing: only its first {2 - clip_skip} layers are read "
                                              f"(model.clip_skip = {clip_skip}), and they lie beyond, such as {dead['text_encoder'][0]}."]


def test_matching_nothing_is_judged_over_both_encoders():
    lay_groups(fresh(), "lora_text_encoder", [group(r"re:.*layers\.3\.")], 0)  # only the second one has four layers
    with pytest.raises(LayerMatchError, match=r"layers\[0\] = 're:te3.*matched none of"):
        lay_groups(fresh(), "lora_text_encoder", [group(r"re:te3\..*mlp$")], 0)
    with pytest.raises(LayerMatchError, match=r"begins with te3; the prefixes here are te1\. and te2\."):
        lay_groups(fresh(), "lora_text_encoder", [group(r"re:te3\..*mlp$")], 0)
    with pytest.raises(LayerMatchError, match=r"it is 're:te2.\*self_attn'"):
        lay_groups(fresh(), "lora_text_encoder", [group("te2.*self_attn")], 0)
    with pytest.raises(LayerMatchError, match=r"\[0\] and lora_text_encoder\[1\] both claim 8 layers"):
        lay_groups(fresh(), "lora_text_encoder", [group("re:te2.*mlp$"), group("re:.*mlp$", exclude=["te1"])], 0)


class Setup:
    """Our step with LoRA on all three parts, and peft's twins of the same weights."""

    def __init__(self, prediction, alphas, gamma):
        torch.manual_seed(0)
        parts = {"unet": make_sdxl_unet(), "text_encoder": make_text_encoder(), "text_encoder_2": make_text_encoder_2()}
        parts = {name: part.double().requires_grad_(False).eval() for name, part in parts.items()}
        self.twins = copy.deepcopy(parts)
        self.alphas, self.prediction, self.gamma = alphas.double(), prediction, gamma
        eos = type("Tokenizer", (), {"eos_token_id": 49407})
        models = Models(FAMILY, None, "tiny", parts, {"tokenizer": eos, "tokenizer_2": eos}, {}, {"latent_scale": 0.13025, "latent_shift": 0.0})
        self.trainables = lay_groups(models, "lora_unet", [group(r"re:.*\.attn.?$", r"re:.*\.ff$", rank=3, alpha=1.5)], 0)
        self.trainables += lay_groups(models, "lora_text_encoder", [group("re:.*self_attn$", "re:.*mlp$", alpha=1)], 0)
        self.pairs = [pair for trainable in self.trainables for pair in self._twin(trainable)]
        self.ids = torch.randint(0, 40000, (3, 2, 77), generator=torch.Generator().manual_seed(5))
        self.ids[:, :, 60:] = 0
        self.ids[torch.arange(3), :, torch.tensor([9, 30, 59])] = 49407
        tokens = type("Tokens", (), {"ids": (self.ids, self.ids)})
        self.step = DenoisingStep(models, DiscreteObjective(self.alphas, prediction), make_loss("mse", 1.0), lambda prompts: FAMILY.encode_text(models, tokens),
                                  torch.device("cpu"), torch.float64, 0.0, gamma)

    def _twin(self, trainable):
        twin, rank = self.twins[trainable.component.name], next(iter(trainable.adapters.values())).rank
        twin.add_adapter(LoraConfig(r=rank, lora_alpha=rank / 2, target_modules=list(trainable.adapters), init_lora_weights=False))
        state = dict(twin.named_parameters())
        for path, lora in trainable.adapters.items():
            torch.nn.init.normal_(lora.up, std=0.05)
            lora.to(torch.float64)
            for mine, name in ((lora.down, "A"), (lora.up, "B")):
                twins = state[f"{path}.lora_{name}.default.weight"]
                with torch.no_grad():
                    twins.copy_(mine)
                yield mine, twins

    def reference_loss(self, batch):
        """Written out, without our family, objective, loss or adapters."""
        outs = [self.twins[name](self.ids.flatten(0, 1), output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        hidden = torch.cat([out.hidden_states[-2].reshape(3, 154, -1) for out in outs], dim=-1)
        last = outs[1].last_hidden_state[::2]  # of each first chunk, through the final norm
        pooled = torch.stack([last[i, place] for i, place in enumerate([9, 30, 59])]) @ self.twins["text_encoder_2"].text_projection.weight.T
        ids = torch.cat([batch.original_size, batch.crop_top_left, batch.target_size], dim=1)
        z = (batch.latent_mean + batch.latent_std * batch.vae_noise) * 0.13025
        t = (batch.u * 1000).floor().long()
        a = self.alphas[t].view(-1, 1, 1, 1)
        noisy = a**0.5 * z + (1 - a) ** 0.5 * batch.noise
        target = batch.noise if self.prediction == "epsilon" else a**0.5 * batch.noise - (1 - a) ** 0.5 * z
        pred = self.twins["unet"](noisy, t, encoder_hidden_states=hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        loss = ((pred - target) ** 2).mean((1, 2, 3))
        if self.gamma is not None:
            snr = self.alphas[t] / (1 - self.alphas[t])
            loss = loss * snr.clamp(max=self.gamma) / (snr if self.prediction == "epsilon" else snr + 1)
        return (loss * batch.weights).sum()


def zero_terminal():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod


@pytest.mark.parametrize("prediction,gamma", [("epsilon", None), ("v_prediction", 5.0)])
def test_loss_and_gradients_equal_a_step_written_out_with_peft(prediction, gamma):
    setup = Setup(prediction, zero_terminal() if prediction == "v_prediction" else torch.linspace(0.999, 0.005, 1000), gamma)
    batch = make_batch()
    batch.u[0] = 0.9999  # the last step of the schedule
    batch.original_size, batch.crop_top_left = torch.tensor([[1025, 70], [64, 64], [333, 500]]), torch.tensor([[0, 3], [0, 0], [7, 0]])
    ours, reference = setup.step.loss(batch), setup.reference_loss(batch)
    ours.backward()
    reference.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-9)
    for mine, twin in setup.pairs:
        assert mine.grad is not None or twin.grad is None or not twin.grad.any()  # CLIP-L's last layer is not read
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-8, atol=1e-12)
    changed = copy.copy(batch)
    changed.original_size = batch.original_size - 1
    assert setup.step.loss(changed).item() != ours.item()  # sizes are seen


def based(models, **config) -> BaseModel:
    base = BaseModel.__new__(BaseModel)
    base.config, base.family, base.models = ModelConfig(pretrained_model_name_or_path="x", **config), FAMILY, models
    return base


def test_the_schedule_of_a_v_prediction_model_with_zero_terminal_snr_is_its_own(models):
    own = Models(FAMILY, models.folder, "tiny", {}, {}, {**models.scheduler_config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    objective = based(own).objective(TrainConfig())
    assert objective.prediction == "v_prediction" and torch.equal(objective.alphas_cumprod, zero_terminal()) and objective.alphas_cumprod[-1] < 1e-6
    own.scheduler_config = {**own.scheduler_config, "prediction_type": "epsilon"}
    with pytest.raises(ConfigError, match="zero terminal SNR.*prediction_type=v_prediction"):
        based(own).objective(TrainConfig())


def test_models_that_only_look_alike_are_refused(models):
    edm = Models(FAMILY, models.folder, "tiny", {}, {}, {"_class_name": "EDMDPMSolverMultistepScheduler"})
    with pytest.raises(ConfigError, match="EDMDPMSolverMultistepScheduler is the schedule of another kind of model"):
        based(edm).objective(TrainConfig())
    nine = copy.copy(models)
    nine.modules = {**models.modules, "unet": make_sdxl_unet()}
    nine.unet.register_to_config(in_channels=9)
    with pytest.raises(ConfigError, match="takes 9 channels.*inpainting"):
        FAMILY._check_channels(nine, "model")


def test_latents_are_scaled_as_the_vaes_config_says():
    models = Models(FAMILY, None, "tiny", {}, {}, {}, {"latent_shift": [[[1.0]], [[2.0]]], "latent_scale": [[[2.0]], [[0.5]]]})
    assert FAMILY.scale_latent(models, torch.ones(1, 2, 1, 1)).flatten().tolist() == [0.0, -0.5]
    kept = models.extra["latent_scale"]
    assert FAMILY.scale_latent(models, torch.ones(1, 2, 1, 1)).flatten().tolist() == [0.0, -0.5] and models.extra["latent_scale"] is kept, "brought beside the latents once"
    assert FAMILY.scale_latent(models, torch.ones(1, 2, 1, 1).double()).dtype == torch.float64


def test_a_dataset_far_below_the_models_own_size_is_told(tiny_sdxl):
    base = BaseModel(ModelConfig(pretrained_model_name_or_path=str(tiny_sdxl)))
    data = {name: DatasetConfig(source={}, bucket=BucketConfig(**keys)) for name, keys in (("small", {"target_area": 1024}), ("own", {"target_area": 4096}), ("fixed", {"sizes": [[8, 8]]}))}
    (line,) = base.size_notes(data)
    assert line.startswith("data.small.bucket.target_area = 1024: this model was made for about 4096 pixels (64 x 64)")
