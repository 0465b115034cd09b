"""Prompts to conditioning: chunks, A1111's weighting, clip_skip, embeddings."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hcpdiff.errors import CheckpointError, ConfigError
from hcpdiff.families import detect
from hcpdiff.vis import embeddings, encode
from hcpdiff.vis.prompt import parse


@pytest.fixture
def models(tiny_sd1):
    return detect(tiny_sd1).load(tiny_sd1, "tiny", ["text_encoder"])


def hidden(models, text, repeats=1, words=encode.Words(), syntax="hcp", **options):
    return encode.encode(models, parse(text, syntax), repeats, words, **options).hidden


def plain(models, text):
    """The text encoder's last hidden state, by transformers alone."""
    ids = models.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return models.text_encoder(ids).last_hidden_state


def test_unweighted_prompt_is_what_transformers_gives(models):
    assert torch.equal(hidden(models, "a photo of a cat"), plain(models, "a photo of a cat"))
    assert torch.equal(hidden(models, "{a photo of a cat:1.0}"), plain(models, "a photo of a cat"))
    assert torch.equal(hidden(models, ""), plain(models, ""))


def by_hand(models):
    """'a {cat:1.3} on {a {mat}:0.8}': states, their weighted form, written out token by token."""
    states = plain(models, "a cat on a mat")[0].double().numpy()
    weights = np.ones(77)
    weights[[2, 4, 5]] = 1.3, 0.8, 0.8 * 1.1  # BOS a cat on a mat EOS
    return states, np.array([[value * w for value in row] for row, w in zip(states, weights)])


def test_weights_scale_tokens_and_keep_the_mean_as_a1111_does(models):
    torch.nn.init.normal_(models.text_encoder.final_layer_norm.bias, mean=0.3, generator=torch.Generator().manual_seed(0))  # as a trained one: it has a mean
    states, weighted = by_hand(models)
    got = hidden(models, "a {cat:1.3} on {a {mat}:0.8}")[0].numpy()
    assert abs(states.mean() / weighted.mean() - 1) > 1e-4  # the restoration is seen
    np.testing.assert_allclose(got, weighted * (states.mean() / weighted.mean()), rtol=2e-5, atol=1e-6)


def test_mean_that_is_only_rounding_noise_is_not_restored(models):
    states, weighted = by_hand(models)  # a new layer norm: every token's mean is 0, and A1111's quotient would flip the sign
    assert abs(states.mean()) < 1e-6
    np.testing.assert_allclose(hidden(models, "a {cat:1.3} on {a {mat}:0.8}")[0].numpy(), weighted, rtol=2e-5, atol=1e-6)


def test_chunks_of_75_are_encoded_and_weighted_each_on_its_own(models):
    long = " ".join(["cat"] * 75)
    got = hidden(models, f"{long} {{dog:1.5}} bird", repeats=3)
    assert torch.equal(got[:, :77], plain(models, long))
    assert torch.equal(got[:, 77:154], hidden(models, "{dog:1.5} bird"))
    assert torch.equal(got[:, 154:], plain(models, ""))
    assert encode.chunks_needed(models, [parse(long), parse(long + " dog"), parse("")], encode.Words()) == [1, 2, 1]


def test_break_begins_a_new_chunk(models):
    got = hidden(models, "a cat BREAK (a dog:1.2)", repeats=2, syntax="webui")
    assert torch.equal(got, torch.cat([plain(models, "a cat"), hidden(models, "{a dog:1.2}")], dim=1))


def test_text_that_is_cut_is_named(models):
    prompt = parse(" ".join(["cat"] * 75 + ["red", "dog"]))
    assert encode.cut_text(models, prompt, encode.Words(), 1) == (2, "red dog")
    assert encode.cut_text(models, prompt, encode.Words(), 2) == (0, "")


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(models, skip):
    ids = models.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = models.text_encoder(ids, output_hidden_states=True).hidden_states[-1 - skip]
        want = torch.nn.functional.layer_norm(states, states.shape[-1:], models.text_encoder.final_layer_norm.weight, models.text_encoder.final_layer_norm.bias)
    torch.testing.assert_close(hidden(models, "a cat", clip_skip=skip), want)


def vectors_of(models, text):
    """The token vectors of a text, as an embedding that means exactly this text."""
    ids = models.tokenizer(text, add_special_tokens=False).input_ids
    return models.text_encoder.get_input_embeddings().weight[ids].clone()


def write(path, vectors, form):
    if form == "a1111":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(vectors)}, "name": "other", "step": 7, "sd_checkpoint": None}, path)
    elif form == "diffusers.bin":
        torch.save({"<token>": vectors[0] if len(vectors) == 1 else vectors}, path)
    else:
        save_file({"emb_params" if form == "emb_params" else "<token>": vectors}, path)
    return path


def words(models, folder, *prompts):
    library = embeddings.find(folder)
    files = embeddings.used(library, prompts)
    return encode.Words(library.pattern(), embeddings.add_words(models, files))


@pytest.mark.parametrize("form, name", [("a1111", "my_car-100.pt"), ("emb_params", "my_car-100.safetensors"), ("token", "my_car-100.safetensors"), ("diffusers.bin", "my_car-100.bin")])
def test_word_becomes_the_vectors_of_its_file(models, tmp_path, form, name):
    write(tmp_path / name, vectors_of(models, "red car"), form)
    want = hidden(models, "a {red car:1.3}, city"), plain(models, "a red car.")
    known = words(models, tmp_path, "a my_car-100")
    assert torch.equal(hidden(models, "a {my_car-100:1.3}, city", words=known), want[0])  # the weight covers both vectors
    assert torch.equal(hidden(models, "a MY_CAR-100.", words=known), want[1])


def test_only_whole_words_are_replaced(models, tmp_path):
    for name in ("cat", "cat-2", "other"):
        write(tmp_path / f"{name}.safetensors", vectors_of(models, "red car"), "emb_params")
    found = embeddings.used(embeddings.find(tmp_path), ["concat cats cat-girl cat_ cat.v2", "a cat-2, (cat): cat."])
    assert sorted(found) == ["cat", "cat-2"]
    assert embeddings.used(embeddings.find(tmp_path), ["concat cats cat-girl cat_ cat.v2"]) == {}
    assert embeddings.used(embeddings.find(None), ["cat"]) == {}


def test_embedding_of_another_model_is_refused_with_both_widths(models, tmp_path):
    save_file({"emb_params": torch.zeros(1, 48)}, tmp_path / "wide.safetensors")
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 64)}, tmp_path / "xl.safetensors")
    with pytest.raises(ConfigError) as error:
        words(models, tmp_path, "wide xl")
    assert "wide.safetensors has vectors of width 48" in error.value.faults[0] and "clip_g 64" in error.value.faults[1] and "has 32" in error.value.faults[1]


def test_embedding_files_that_run_code_or_are_damaged_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    save_file({"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}, tmp_path / "two.safetensors")
    for name in ("evil.pt", "cut.safetensors", "two.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            embeddings.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_two_embeddings_of_one_name_are_an_error_once_used(models, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "cat.pt", vectors_of(models, "red"), "a1111")
    with pytest.raises(ConfigError, match="several embeddings"):
        embeddings.used(embeddings.find(tmp_path), ["a cat"])
    assert embeddings.used(embeddings.find(tmp_path), ["a dog"]) == {}
