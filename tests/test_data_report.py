"""The start report says what the user must know before hours are spent."""

import io

import pytest
from data_help import build, dataset, folder_of, source
from rich.console import Console

from hcpdiff.data import report


def shown(data):
    console = Console(file=io.StringIO(), width=200)
    data.report(console)
    return console.file.getvalue()


@pytest.fixture
def root(tmp_path):
    return folder_of(tmp_path / "imgs", {"wide.png": (200, 100), "1.png": (64, 64), "2.png": (64, 64), "small.png": (32, 32)}, captions=True)


def test_sources_buckets_prompts_and_shape_of_an_epoch_are_shown(root):
    text = shown(build(dataset(source(root, caption_file=str(root), word_names={"pt1": "trig"}, repeats=2), buckets=1), micro_per_step=2))
    assert "d0.s0" in text and "4 of 4" in text and "32 x 32" in text and "200 x 100" in text
    assert "8 samples in 2 steps of up to 2 x 2" in text
    assert "'trig, caption of " in text


def test_bucket_rows_hold_the_cropped_share_and_what_is_enlarged(root):
    data = build(dataset(source(root), bucket={"sizes": [[64, 64]]}))
    assert report.bucket_rows(data.datasets[0]) == [((64, 64), 4, pytest.approx(0.125), pytest.approx(0.5), 1)]
    assert "50.0%" in shown(data)


def test_first_prompts_are_those_of_the_first_samples(root):
    data = build(dataset(source(root, caption_file=str(root), tag_shuffle=True)))
    batches = [batch for _, _, found in data.batches(count=data.steps_per_epoch) for batch in found]
    assert report.first_prompts(data) == [(name.removeprefix("d0/"), prompt) for batch in batches for name, prompt in zip(batch.ids, batch.prompts)][:5]


def test_first_prompts_come_from_every_dataset(tmp_path):
    roots = [folder_of(tmp_path / name, {f"{n}.png": (64, 64) for n in range(9)}, captions=True) for name in "ab"]
    data = build(*(dataset(source(root, caption_file=str(root), word_names={"pt1": word})) for root, word in zip(roots, ("cat", "dog"))))
    prompts = report.first_prompts(data)
    assert [name.split("/")[0] for name, _ in prompts] == ["d0", "d0", "d1", "d1"] and [prompt.split(",")[0] for _, prompt in prompts] == ["cat", "cat", "dog", "dog"]
    assert "First prompts of each dataset:" in shown(data)


def test_prompts_that_are_too_long_are_counted_and_named(root):
    (root / "1.txt").write_text("word " * 90)
    (root / "2.txt").write_text("averyverylongwordthatisonetoken" * 4)
    data = build(dataset(source(root, caption_file=str(root))), token_count=lambda prompt: len(prompt.split()))
    assert report.too_long(data) == [("s0/1.png", 90)]
    text = shown(data)
    assert "1 prompts are longer than 75 tokens and will be cut off: s0/1.png (90)" in text and "model.tokenizer_repeats: 2" in text


def test_notes_name_missing_and_empty_captions_skipped_images_unused_words_and_fewer_buckets(root):
    (root / "1.txt").unlink()
    (root / "2.txt").write_text("")
    (root / "bad.png").write_bytes(b"")
    (root / "extra.txt").write_text("for no image")
    text = shown(build(dataset(source(root, caption_file=str(root), skip_bad_images=True, word_names={"who": "x"}), buckets=4)))
    for part in ("1 images have no caption: 1.png", "1 captions are empty: 2.png", "1 images cannot be read and are left out: bad.png", "word_names.who is used by no template",
                 "belong to no image: 'extra'", "2 buckets instead of num_bucket = 4", "d0.bucket"):
        assert part in text


def test_captions_without_a_place_in_the_template_are_noted(root, tmp_path):
    template = tmp_path / "t.txt"
    template.write_text("a photo of {pt1}")
    text = shown(build(dataset(source(root, caption_file=str(root), prompt_template=str(template), word_names={"pt1": "x"}))))
    assert "the captions are not used" in text
    template.write_text("{pt1}, {caption}")
    assert "{caption} stays empty" in shown(build(dataset(source(root, prompt_template=str(template), word_names={"pt1": "x"}))))
    assert "every prompt is empty" in shown(build(dataset(source(root))))


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path):
    root = folder_of(tmp_path / "imgs", {"[red]x[/red].png": (64, 64)})
    data = build(dataset(source(root, word_names={"pt1": "[bold]trig"})))
    assert "[red]x[/red].png: '[bold]trig'" in shown(data)


def test_largest_batch_for_the_probe(root):
    assert build(dataset(source(root), batch_size=3, bucket={"sizes": [[64, 64], [128, 64]]})).largest_batch() == (3, 64, 64)


@pytest.mark.parametrize("images, expected", [
    ({(128, 64): 1, (64, 128): 2}, (64, 128)), ({(64, 64): 1, (128, 64): 3, (64, 128): 2}, (128, 64)), ({(64, 128): 2, (96, 64): 2, (128, 64): 2}, (96, 64)),
    ({(64, 64): 1, (128, 128): 1}, (128, 128)), ({(64, 128): 1}, (64, 128)), ({(64, 96): 2, (128, 192): 2}, (128, 192)), ({(64, 128): 1, (128, 64): 1}, (128, 64))])
def test_the_main_size_is_that_of_most_images_then_the_squarest_then_the_largest(tmp_path, images, expected):
    files = {f"{width}x{height}-{n}.png": (width, height) for (width, height), count in images.items() for n in range(count)}
    more = folder_of(tmp_path / "more", {f"{n}.png": (64, 64) for n in range(9)})
    for sizes in (sorted(images), sorted(images, reverse=True), [[32, 32], *sorted(images)]):  # an empty bucket before them too
        first = dataset(source(folder_of(tmp_path / f"imgs{sizes[0]}", files)), bucket={"sizes": [list(size) for size in sizes]})
        assert build(first).main_size() == expected
        assert build(first, dataset(source(more), bucket={"sizes": [[64, 64]]})).main_size() == expected  # the first dataset's, whose epochs are the run's
