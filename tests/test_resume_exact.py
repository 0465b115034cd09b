"""A run that is stopped anywhere and resumed ends in the bits of one that was not: weights, optimizer, place in the data, TensorBoard.

Each case is a whole run and one that is stopped twice or thrice; the cases together hold every pair of values of any two settings.
"""

import itertools
import random
import shutil

import pytest
from run_help import age, assert_same_run, images, run

STEPS, EPOCH = 6, 3  # 5 images of two shapes in batches of 2 make 3 chunks; with accumulation 2, an epoch has 2 steps and its last one is not full
CONFIG = """
train: {{train_steps: 6, cpu_threads: 1, log_step: 4, save_step: 4, keep_states: 9, scheduler: {{name: cosine, num_warmup_steps: 2}}, optimizer: {{_target_: torch.optim.AdamW}}}}
model: {{pretrained_model_name_or_path: '{model}'}}
preview: {{every: 2, num_inference_steps: 1, width: 64, height: 64}}
data:
  one:
    batch_size: 2
    source: {{a: {{img_root: images, caption_file: images, word_names: {{pt1: thing}}}}}}
    bucket: {{sizes: [[64, 64], [96, 64]], crop: random, crop_variants: 2}}
"""
SOURCE = "data.one.source.a."
UNET = "lora_unet=[{{lr: 1e-2, rank: 2, layers: ['re:.*attn2\\.to_[kv]$'], dropout: {dropout}}}]"
TEXT = "lora_text_encoder=[{{lr: 1e-2, rank: 2, layers: ['re:.*self_attn$'], dropout: {dropout}}}]"
FACTORS = {
    "trained": ("unet", "text", "both"),
    "latents": ("memory", "disk", "none"),
    "tag_shuffle": (False, True),
    "dropout": (0.0, 0.3),
    "caption_dropout": (0.0, 0.4),
    "flip": (False, True),
    "accumulation": (1, 2),
    "precision": ("fp32", "bf16"),
    "previews": (False, True),
}
STOPS = ((1, 4), (2, 3), (5,))  # after the first step; inside an epoch and at its end; in the last epoch; the cases take them in turn


def covering(factors: dict[str, tuple], tries: int = 40) -> list[dict]:
    """Few cases in which every pair of values of two factors stands together: each next case is, of some random ones, the one with most pairs that are new."""
    names, shortest = list(factors), None
    every = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    for seed in range(tries):
        rng, todo, cases = random.Random(seed), set(every), []
        while todo and (shortest is None or len(cases) < len(shortest) - 1):
            candidates = [{name: rng.choice(values) for name, values in factors.items()} for _ in range(12)]
            case = max(candidates, key=lambda one: len(pairs(one, names) & todo))
            for name in rng.sample(names, len(names)):
                case[name] = max(factors[name], key=lambda value: len(pairs({**case, name: value}, names) & todo))
            todo -= pairs(case, names)
            cases.append(case)
        shortest = shortest if todo else cases
    return shortest


def pairs(case: dict, names: list[str]) -> set[tuple]:
    """The pairs that stand together in a case."""
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2) if a in case and b in case}


def overrides(case: dict) -> list[str]:
    """The case as arguments of a command line."""
    lora = {"unet": [UNET], "text": [TEXT], "both": [UNET, TEXT]}[case["trained"]]
    return [*(text.format(dropout=case["dropout"]) for text in lora), f"data.one.cache_latents={case['latents']}", "train.workers=0",
            *(f"{SOURCE}{key}={str(case[key]).lower()}" for key in ("tag_shuffle", "caption_dropout", "flip")),
            f"train.gradient_accumulation_steps={case['accumulation']}", f"mixed_precision={case['precision']}", *(["preview.prompts=[cat]"] if case["previews"] else [])]


CASES = covering(FACTORS)
WORKERS = {"trained": "both", "latents": "none", "tag_shuffle": True, "dropout": 0.3, "caption_dropout": 0.4, "flip": True, "accumulation": 2, "precision": "fp32", "previews": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sd1):
    folder = tmp_path_factory.mktemp("exact")
    images(folder / "images")
    (folder / "cfg.yaml").write_text(CONFIG.format(model=tiny_sd1), encoding="utf-8")
    return folder


def stopped(arguments: list[str], stops, *more: str, crash: bool | str = False):
    """The folder of a run that was stopped after each of `stops` and then went on to the end; `crash`: that died there instead, after its last save."""
    parts, _ = run("cfg.yaml", "exp_dir=parts", *arguments, stop=stops[0], crash=crash)
    for stop in (*stops[1:], None):
        age(parts.folder)
        run("cfg.yaml", f"train.resume={parts.folder}", *arguments, *more, stop=stop, crash=crash and stop is not None)
    return parts.folder


def compare(place, monkeypatch, arguments: list[str], stops, *more: str, crash: bool | str = False) -> None:
    monkeypatch.chdir(place)
    for name in ("whole", "parts", ".hcp-cache"):
        shutil.rmtree(name, ignore_errors=True)
    whole, _ = run("cfg.yaml", "exp_dir=whole", *arguments)
    assert_same_run(whole.folder, stopped(arguments, stops, *more, crash=crash), STEPS)


def test_the_cases_hold_every_pair():
    names, held = list(FACTORS), set()
    for case in CASES:
        held |= pairs(case, names)
    assert held == {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]} and len(CASES) <= 10, len(CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number].values())))
def test_a_stopped_run_ends_in_the_same_bits(place, monkeypatch, number):
    compare(place, monkeypatch, overrides(CASES[number]), STOPS[number % 3])


def test_a_run_that_died_between_saves_ends_in_the_same_bits(place, monkeypatch):
    """What was logged beyond the state is logged again; TensorBoard shows it once."""
    compare(place, monkeypatch, [*overrides({**WORKERS, "accumulation": 1}), "train.save_step=2", "train.log_step=1"], (3, 5), crash=True)


def test_a_run_that_died_inside_an_accumulation_does_it_again(place, monkeypatch):
    compare(place, monkeypatch, [*overrides(WORKERS), "train.save_step=1", "train.log_step=1"], (2, 4), crash="inside")


def test_loader_workers_and_a_resume_with_another_number_of_them_change_nothing(place, monkeypatch):
    compare(place, monkeypatch, [word for word in overrides(WORKERS) if "workers" not in word] + ["train.workers=0"], (4,), "train.workers=2")


@pytest.mark.long
@pytest.mark.parametrize("before,after", [(0, 1), (1, 2), (2, 0)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_stopped_run_with_loader_workers_ends_in_the_same_bits(place, monkeypatch, case, before, after):
    arguments = [word for word in overrides({**case, "latents": "none"}) if "workers" not in word] + [f"train.workers={before}"]
    compare(place, monkeypatch, arguments, (2, 5), f"train.workers={after}")


@pytest.mark.long
@pytest.mark.parametrize("stop", range(1, STEPS))
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=["first", "last"])
def test_a_run_stopped_after_any_step_ends_in_the_same_bits(place, monkeypatch, case, stop):
    compare(place, monkeypatch, overrides(case), (stop,))
