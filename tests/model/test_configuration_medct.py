"""Configuration: the published sizes, derived values, and what is refused."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError

from medct import CT_CLIP_LABELS, MedCTConfig, MedCTVisionConfig

SIZES = (("a", 2), ("b", 3), ("c", 1))


def test_defaults_are_the_published_model():
    config = MedCTConfig()
    vision = config.vision_config
    assert vision.grid_size == (24, 24, 24)
    assert vision.patch_voxels == 4000
    assert vision.attention_size == 256
    assert vision.intermediate_size == 1365
    assert vision.pooled_size == 294_912
    assert config.text_config.model_type == "bert"
    assert config.label_names == list(CT_CLIP_LABELS)
    assert len(CT_CLIP_LABELS) == len(set(CT_CLIP_LABELS)) == 18


def test_prompts_alternate_present_and_absent():
    config = MedCTConfig(
        prompt_templates=[["{label} is present.", "{label} is not present."], ["{label}", "no {label}"]]
    )
    first, second = config.label_prompts(["Emphysema", "Cardiomegaly"])
    assert first[:3] == ["Emphysema is present.", "Emphysema is not present.", "Cardiomegaly is present."]
    assert second == ["Emphysema", "no Emphysema", "Cardiomegaly", "no Cardiomegaly"]
    assert len(config.label_prompts()[0]) == 36


def test_every_label_weighs_the_same_however_many_pairs_it_has():
    pairs = {name: [[f"{name}{number}.", f"no {name}{number}."] for number in range(count)] for name, count in SIZES}
    templates = MedCTConfig(id2label={0: "a", 1: "b", 2: "c"}).label_prompts(pairs)
    assert len(templates) == 6
    for column, (name, count) in enumerate(SIZES):
        asked = [(template[2 * column], template[2 * column + 1]) for template in templates]
        assert all(asked.count(tuple(pair)) == 6 // count for pair in pairs[name])


def test_templates_that_are_given_are_for_all_labels():
    """Also for those with sentences of their own, but words of their own stand in them."""
    own = {"a": [["A is seen.", "No A."]], "b": "words of b"}
    config = MedCTConfig(id2label={0: "a", 1: "b"}, prompts=own, prompt_templates=[["{label}!", "no {label}!"]])
    assert config.label_prompts() == [["A is seen.", "No A.", "words of b!", "no words of b!"]]
    given = config.label_prompts(templates=[["{label}?", "no {label}?"]])
    assert given == [["a?", "no a?", "words of b?", "no words of b?"]]
    # Whoever passes both means the sentences where there are some.
    both = config.label_prompts({"b": [["B!", "b!"]], "c": "words of c"}, [["{label}?", "no {label}?"]])
    assert both == [["B!", "b!", "words of c?", "no words of c?"]]


def test_tasks_belong_to_one_configuration():
    """`transformers.pipeline` writes classes into them, in the place of their names."""
    tasks = {"a task": {"impl": "a.A", "pt": ["AutoModel"]}}
    first, second = (MedCTConfig(custom_pipelines=tasks) for _ in range(2))
    first.custom_pipelines["a task"]["pt"] = (object,)
    for others in (second.custom_pipelines, tasks):
        assert others["a task"]["pt"] == ["AutoModel"]


def test_survives_saving_and_loading(tmp_path):
    config = MedCTConfig(
        vision_config={"hidden_size": 48, "patch_size": [10, 24, 24]},
        text_config={"model_type": "distilbert", "dim": 24},
        id2label={0: "nodule", 1: "mass"},
    )
    config.save_pretrained(tmp_path)
    again = MedCTConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.text_config.dim == 24
    assert again.vision_config.grid_size == (24, 20, 20)
    assert again.label_names == ["nodule", "mass"]


@pytest.mark.parametrize("config", [MedCTConfig(num_labels=2, classifier_pos_weight=[1.5, 2.5]), MedCTVisionConfig()])
def test_a_number_may_be_whole(config):
    """As whoever writes a configuration by hand, or in another language, writes 1 and 0."""
    fractions = {name: value for name, value in config.to_dict().items() if isinstance(value, float)}
    whole = {name: max(1, round(value)) for name, value in fractions.items()}
    if getattr(config, "classifier_pos_weight", None):
        whole |= {"classifier_pos_weight": [1, 3], "num_labels": 2}
    again = type(config)(**whole)
    assert fractions and all(getattr(again, name) == value for name, value in whole.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": (240, 480, 490)}, "490 along x is not a multiple of `patch_size` 20"),
        ({"image_size": (240, 480)}, r"three positive whole numbers .* not \(240, 480\)"),
        ({"target_spacing_mm": (1.5, 0.0, 0.75)}, r"not \(1.5, 0.0, 0.75\)"),
        ({"target_spacing_mm": (math.inf, 1, 1)}, r"not \(inf, 1, 1\)"),
        ({"hu_min": 100, "hu_max": -100}, "100 HU must lie below `hu_max` -100 HU"),
        ({"hu_min": 100, "hu_max": 100}, "100 HU must lie below `hu_max` 100 HU"),
        ({"orientation": "SSP"}, 'not "SSP"'),
        ({"codebook_size": 0}, "must be positive, not 0"),
        ({"hidden_size": 1.5}, "hidden_size"),
    ],
)
def test_impossible_vision_values_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        MedCTVisionConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projection_dim": 0}, "not 0"),
        ({"prompt_templates": [["{label} is present."]]}, "pair of sentences"),
        ({"prompt_templates": [["present", "absent"]]}, "pair of sentences"),
        ({"classifier_pos_weight": [1.0, 2.0]}, "2 numbers for 18 labels"),
        # As cases without a finding over cases with it are, where nobody has it.
        ({"classifier_pos_weight": [math.inf] * 18}, "must be finite numbers of 0 or more"),
        ({"classifier_pos_weight": [-1.0] * 18}, "must be finite numbers of 0 or more"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        MedCTConfig(**values)


def test_labels_keep_the_order_of_their_numbers_however_these_are_written():
    names = {str(index): f"finding {index}" for index in range(12)}
    expected = list(names.values())
    assert MedCTConfig(id2label=names).label_names == expected
    config = MedCTConfig()
    config.id2label = names
    assert config.label_names == expected


@pytest.mark.parametrize("count", [1, 2, 18])
def test_labels_without_names_are_saved_too(count, tmp_path):
    """A head of two, the number that the library takes for granted, would not fit what is loaded."""
    config = MedCTConfig(id2label={index: f"LABEL_{index}" for index in range(count)})
    config.save_pretrained(tmp_path)
    assert MedCTConfig.from_pretrained(tmp_path).label_names == config.label_names


@pytest.mark.parametrize("name", ["two\nlines", "a\x1b[31m", "\x00"])
def test_names_of_labels_hold_no_control_characters(name):
    """They become columns, titles, codes, and text on a terminal."""
    with pytest.raises(StrictDataclassError, match="of a label holds a control character"):
        MedCTConfig(id2label={0: name})
    with pytest.raises(ValueError, match="of a label holds a control character"):
        MedCTConfig().label_prompts([name])
