"""Layer patterns: what they claim, and what is said when they claim nothing or too much."""

from types import SimpleNamespace

import pytest
from tiny import make_text_encoder, make_unet

from hcpdiff.adapters.select import select
from hcpdiff.errors import LayerMatchError
from hcpdiff.families.sd import StableDiffusion


def group(*layers, exclude=()):
    return SimpleNamespace(layers=list(layers), exclude=list(exclude))


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def paths(model, *groups, aliases=None):
    options = {} if aliases is None else {"aliases": aliases}
    return [selection.paths for selection in select(model, groups, "lora_unet", **options)]


def test_the_template_claims_sd15s_160_layers(unet):
    (found,) = paths(unet, group(r"re:.*\.attn.?$", r"re:.*\.ff$"))
    assert len(found) == 160 and len(set(found)) == 160
    assert all(".attn" in path or ".ff." in path for path in found)


def test_the_guides_advanced_patterns_claim_k_v_and_ff(unet):
    (found,) = paths(unet, group(r"re:.*\.to_k$", r"re:.*\.to_v$", r"re:.*\.ff$"))
    assert len(found) == 32 + 32 + 32


def test_text_encoder_names_match_with_and_without_prefix():
    encoder = make_text_encoder()
    family = StableDiffusion()

    def aliases(path):
        return family.aliases("text_encoder", path)

    spellings = ["re:.*self_attn$", r"re:encoder\.layers\.\d+\.self_attn", r"re:text_model\.encoder\.layers\.\d+\.self_attn"]
    found = [paths(encoder, group(p), aliases=aliases)[0] for p in spellings]
    assert found[0] == found[1] == found[2] and len(found[0]) == 12


def test_exact_names_and_exclude(unet):
    everything, less = paths(unet, group("mid_block"))[0], paths(unet, group("mid_block", exclude=[r"re:.*attentions.*"]))[0]
    assert set(less) < set(everything) and not any("attentions" in path for path in less)
    assert paths(unet, group("conv_in"))[0] == ("conv_in",)


def test_all_faults_come_in_one_message(unet):
    with pytest.raises(LayerMatchError) as caught:
        select(unet, [group(r"re:.*\.atn.?$", "conv_inn"), group("re:("), group("mid_block.attentions.0.norm")], "lora_unet")
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "lora_unet[0].layers[0] = 're:.*\\\\.atn.?$' matched none" in text and "attn1" in text
    assert "conv_in" in text and "not a regular expression" in text and "no Linear or Conv2d" in text


@pytest.mark.parametrize("pattern, prefixes, says", [
    (r"re:te3\..*mlp$", ["te1", "te2"], "No module's name begins with te3; the prefixes here are te1. and te2."), ("te1.encoder", [], "No module's name begins with te1; this part of the model has no prefixes."),
    ("mid.*attn$", [], "Without re: a pattern is an exact name; as a regular expression it is 're:mid.*attn$'.")])
def test_a_prefix_that_there_is_not_and_an_expression_without_re_are_told(unet, pattern, prefixes, says):
    with pytest.raises(LayerMatchError) as caught:
        select(unet, [group(pattern)], "x", prefixes=prefixes)
    assert says in str(caught.value)


def test_advice_is_given_only_where_it_is_of_use(unet):
    with pytest.raises(LayerMatchError) as caught:
        select(unet, [group(r"re:.*to_kk$", "mid_block.atn", "down_blocks.7")], "x")
    assert len(caught.value.faults) == 3 and "Without re:" not in str(caught.value) and "begins with" not in str(caught.value)


def test_layers_of_two_groups_are_named(unet):
    with pytest.raises(LayerMatchError, match=r"lora_unet\[0\] and lora_unet\[1\] both claim 32 layers"):
        select(unet, [group(r"re:.*\.attn.?$"), group(r"re:.*to_k$")], "lora_unet")


def test_a_pattern_is_matched_from_the_start_of_the_name(unet):
    with pytest.raises(LayerMatchError):
        select(unet, [group("re:to_k$")], "lora_unet")
