"""Volumes and texts in one call."""

import numpy as np
import pytest
import torch
from scan_files import AFFINE, make_hu, write_series

from medct import MedCTProcessor, VolumeError
from medct.processing_medct import TextError


def test_images_and_text_together(processor, nifti):
    scan = nifti(np.zeros((6, 6, 6), np.int16))
    batch = processor(images=[scan, str(scan)], text=["a b c", "a"], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 1, 8, 12, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_either_alone(processor, nifti):
    assert set(processor(images=nifti(np.zeros((6, 6, 6), np.int16)), return_tensors="pt")) == {"pixel_values"}
    assert "pixel_values" not in processor(text="a b", return_tensors="pt")


def test_options_reach_the_image_processor(processor):
    stored = np.full((8, 12, 8), 1024, np.int16)
    batch = processor(
        images=stored,
        text="a",
        spacing_mm=(1.5, 0.75, 0.75),
        rescale_slope=1,
        rescale_intercept=-1524,
        return_tensors="pt",
    )
    torch.testing.assert_close(batch["pixel_values"], torch.full((1, 1, 8, 12, 8), -0.5))


def test_a_series_as_a_list_and_the_way_back(processor, tmp_path):
    hu = make_hu((8, 12, 8))
    files = sorted(write_series(tmp_path, hu).iterdir())
    batch = processor(images=[files], text="a", return_geometry=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 1, 8, 12, 8)
    assert torch.equal(batch["pixel_values"], processor(images=tmp_path, return_tensors="pt")["pixel_values"])
    (geometry,) = batch["geometry"]
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-6)
    with pytest.raises(VolumeError, match="one slice, which is not a volume"):
        processor(images=files, return_tensors="pt")


def test_long_texts_are_cut_at_what_the_encoder_reads(processor):
    assert processor(text="a " * 100, return_tensors="pt")["input_ids"].shape == (1, 32)


def test_a_tokenizer_that_knows_no_words_is_refused(processor, tmp_path):
    """transformers makes one where its files are missing; all prompts would be one and the same to the model."""
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TextError, match=f"{tmp_path}: a tokenizer that knows no words"):
        MedCTProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", range(4))
def test_an_unknown_word_in_any_sentence_is_remarked_on(processor, place):
    """Present or absent, in whichever template; and alike are only labels that are so in all sentences."""
    sentences = ["a a .", "not a .", "b b .", "not b ."]
    templates = [[*sentences], [*sentences]]
    assert processor.remark_on_words(templates, ["A", "B"]) is None
    templates[1][place] = "肺 ."
    remark = processor.remark_on_words(templates, ["A", "B"])
    assert f"1 of 2 labels ({'AABB'[place]}). Give them" in remark
    templates[1][(place + 2) % 4] = "气 ."
    assert "2 of 2 labels (A, B). Give them" in processor.remark_on_words(templates, ["A", "B"])
    alike = [["肺 .", "not 肺 .", "气 .", "not 气 ."]]
    assert "(A, B): they cannot be told from one another." in processor.remark_on_words(alike, ["A", "B"])


def test_texts_are_tokenized_by_the_same_settings_for_every_purpose(processor):
    """The tokenizer keeps them: others would be those of a call by another thread that is on its way."""
    backend = processor.tokenizer.backend_tokenizer
    processor(text=["mass.", "no mass."], return_tensors="pt")
    settings = (backend.padding, backend.truncation)
    processor.remark_on_words([["mass.", "no mass."]], ["A"])
    assert (backend.padding, backend.truncation) == settings


def test_survives_saving_and_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MedCTProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again(text="a b.")["input_ids"] == processor(text="a b.")["input_ids"]


def test_arguments_that_there_are_not(processor):
    stored = np.full((8, 12, 8), 1024, np.int16)
    for name in ("hu_min", "rescale_intersept", "fps", "videos"):
        with pytest.raises(TypeError, match=name):
            processor(images=stored, text="a", spacing_mm=(1.5, 0.75, 0.75), **{name: -1024})
        with pytest.raises(TypeError, match=name):
            processor(images=stored, spacing_mm=(1.5, 0.75, 0.75), images_kwargs={name: -1024})
    passed = {
        "common_kwargs": {"return_tensors": "pt"},
        "text_kwargs": {"max_length": 8, "padding": "max_length"},
        "images_kwargs": {"spacing_mm": (1.5, 0.75, 0.75), "data_format": "channels_first"},
        "return_mm_token_type_ids": False,
        "add_special_tokens": False,
    }
    batch = processor(images=stored, text="a", **passed)
    assert batch["input_ids"].shape == (1, 8)
    assert batch["pixel_values"].shape == (1, 1, 8, 12, 8)
