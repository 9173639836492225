"""What a model is asked, what the data call it, and how the one becomes the other."""

import math

import numpy as np
import pandas as pd
import pytest
from openpyxl import Workbook

from medct import CT_CLIP_LABELS, MedCTConfig
from medct.data import DataError, PhantomCohort, Source, open_source
from medct.data.label_space import (
    LabelSpace,
    any_of,
    merge_columns,
    pairs_of,
    published_mappings,
    read_label_flags,
    read_labels,
    told_apart,
)
from medct.data.sources import Merged
from medct.data.tables import check_labels

CONFIG = MedCTConfig()
NAN = math.nan


@pytest.fixture
def table(tmp_path):
    def write(text, name="labels.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def source_of(names, *rows):
    return Source(
        [(key,) for key in range(len(rows))],
        lambda key: {"id": str(key), "labels": list(rows[key])},
        tuple(names),
        f"{len(rows)} studies",
    )


def labels_of(source):
    return [row["labels"] for row in source.stream()]


def same(found, expected):
    return np.array_equal(np.array(found, float), np.array(expected, float), equal_nan=True)


# What the model is asked


def test_own_labels_replace_the_models(table):
    path = table("label;data;words\nErguss;pe;pleural effusion\nLungenrundherd;;\nPneumothorax;ptx;\n")
    config, mapping = read_label_flags(CONFIG, path)
    assert config.label_names == ["Erguss", "Lungenrundherd", "Pneumothorax"]
    assert config.label_prompts() == [
        [
            "pleural effusion is present.",
            "pleural effusion is not present.",
            "Lungenrundherd is present.",
            "Lungenrundherd is not present.",
            "Pneumothorax is present.",
            "Pneumothorax is not present.",
        ]
    ]
    assert LabelSpace.of(config, mapping).columns == ("pe", "Lungenrundherd", "ptx")
    assert CONFIG.label_names == list(CT_CLIP_LABELS), "the model's own configuration is as it was"


def test_sentences_and_templates_in_any_language(table):
    path = table("label,present,absent\nErguss,Ein Erguss liegt vor.,Kein Erguss.\nMilzriss,,\n")
    config, mapping = read_label_flags(
        CONFIG, path, ["{label} liegt vor.|{label} liegt nicht vor.", "Es gibt {label}.|Ohne {label}."]
    )
    assert mapping is None, "the data have the same names"
    assert config.label_prompts() == [
        ["Ein Erguss liegt vor.", "Kein Erguss.", "Milzriss liegt vor.", "Milzriss liegt nicht vor."],
        ["Ein Erguss liegt vor.", "Kein Erguss.", "Es gibt Milzriss.", "Ohne Milzriss."],
    ]


def test_commands_and_pipelines_ask_the_same(table):
    """Sentences of a table stand, and those that a model remembers give way to templates."""
    given, templates = {"b": [["B!", "No b!"]], "c": "words of c"}, ["{label}?|no {label}?"]
    remembers = MedCTConfig(id2label={0: "a", 1: "b"}, prompts={"a": [["A is seen.", "No A."]], "b": "words of b"})
    pairs = pairs_of(templates)
    (config, _) = read_label_flags(remembers, templates=templates)
    assert config.label_prompts() == remembers.label_prompts(templates=pairs)
    path = table("label,words,present,absent\nb,,B!,No b!\nc,words of c,,\n")
    assert read_label_flags(remembers, path, templates)[0].label_prompts() == remembers.label_prompts(given, pairs)


def test_the_configuration_travels(table, tmp_path):
    config, _ = read_label_flags(CONFIG, table("label,words\nErguss,effusion\n"), ["{label}!|no {label}!"])
    config.save_pretrained(tmp_path / "saved")
    again = MedCTConfig.from_pretrained(tmp_path / "saved")
    assert again.label_prompts() == config.label_prompts() == [["effusion!", "no effusion!"]]
    assert (again.label_names, again.num_labels, again.label2id) == (["Erguss"], 1, {"Erguss": 0})


def test_a_column_of_labels_will_do(table):
    config, mapping = read_label_flags(CONFIG, table("label\nb\na\n"))
    assert (config.label_names, mapping) == (["b", "a"], None)


def test_labels_from_a_sheet(tmp_path):
    book = Workbook()
    for row in (["label", "words"], ["气胸", "pneumothorax"]):
        book.active.append(row)
    book.save(tmp_path / "labels.xlsx")
    assert (
        read_label_flags(CONFIG, str(tmp_path / "labels.xlsx"))[0].label_prompts()[0][0] == "pneumothorax is present."
    )


def test_a_classifier_is_asked_nothing_in_words(table, classifier_folder):
    config = MedCTConfig.from_pretrained(classifier_folder)
    for asks in ((table("label\na\n"), None, None), (None, ["{label}|no {label}"], None)):
        with pytest.raises(DataError, match="The model is a classifier"):
            read_label_flags(config, *asks)
    config, mapping = read_label_flags(config, mapping=table(f"label,data\n{config.label_names[0]},x\n"))
    assert LabelSpace.of(config, mapping).columns == ("x",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("name\na\n", "has no column 'label', but 'name'"),
        ("label\n", "it has no labels"),
        ("label,words\n,effusion\n", "row 1: the label '' is empty or given twice"),
        ("label\na\na\n", "'a' is there twice"),
        ("label,data,words\na,x,one\na,y,two\n", "'a' has two prompts"),
        ("label,present,absent\na,It is.,\n", "write both sentences"),
        ("label,words,present,absent\na,b,It is.,It is not.\n", "write both sentences, .* or `words` alone"),
        ("label,data,merge\na|b,x,mean\n", "there is no rule 'mean'. `merge` is one of max, max_or_min"),
        ("label,data\na|b,\n", "need their name in the data"),
        ("label,data\na|b,x\na,y\n", "'a' is merged with others in one row and not so in another"),
        ("label,data\na|b,x\n", "a model is asked for one finding at a time"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(table, text, message):
    with pytest.raises(DataError, match=message):
        read_label_flags(CONFIG, table(text))


def test_what_is_not_there_is_named(tmp_path):
    published = "hlip, radfinder-extended, radfinder-standard"
    with pytest.raises(DataError, match=rf"--mapping nothing: no such file\. .* published mappings {published}\."):
        read_label_flags(CONFIG, mapping="nothing")
    with pytest.raises(DataError, match=r"--labels nothing: no such file\. Pass a table with the column `label`\."):
        read_label_flags(CONFIG, labels="nothing")
    with pytest.raises(DataError, match=r"--templates: .* pair of sentences"):
        read_label_flags(CONFIG, templates=["{label} is there."])


# What the data say


def test_a_mapping_by_hand(table):
    """Four studies; every label worked out from the table."""
    rows = ("label,data", "Emphysema,bullae", "Emphysema,emphysema", "Atelectasis,collapse")
    text = "\n".join((*rows, "Cardiomegaly|Pericardial effusion,heart"))
    config, mapping = read_label_flags(CONFIG, mapping=table(text, "site.csv"))
    space = LabelSpace.of(config, mapping)
    assert space.columns == ("bullae", "emphysema", "collapse", "heart")
    names = ("heart", "bullae", "collapse", "emphysema", "left alone")
    source = space.apply(
        source_of(names, (1, 0, 1, 0, 1), (0, 1, 0, NAN, 1), (NAN, 0, NAN, NAN, 1), (0, NAN, 0, NAN, 1))
    )
    assert source.label_names == CT_CLIP_LABELS
    found = {name: [row[index] for row in labels_of(source)] for index, name in enumerate(CT_CLIP_LABELS)}
    assert same(found["Emphysema"], [0, 1, NAN, NAN]), "one that is present will do, one that is unknown may be present"
    assert same(found["Atelectasis"], [1, 0, NAN, 0])
    assert same(found["Cardiomegaly"], [1, 0, NAN, 0]) and same(found["Pericardial effusion"], [1, 0, NAN, 0])
    others = set(CT_CLIP_LABELS) - {"Emphysema", "Atelectasis", "Cardiomegaly", "Pericardial effusion"}
    assert all(same(found[name], [NAN] * 4) for name in others), "no counterpart: unknown, not absent"
    assert source.description == "4 studies, 3 labels by site"
    assert source.mapping == {
        "name": "site",
        "source": "",
        "labels": {
            "Emphysema": ["bullae", "emphysema"],
            "Atelectasis": ["collapse"],
            "Cardiomegaly or Pericardial effusion": ["heart"],
        },
    }
    learned = np.array(labels_of(told_apart(source)))
    assert same(learned[:, CT_CLIP_LABELS.index("Cardiomegaly")], [NAN, 0, NAN, 0]), "which of both, nobody knows"
    scored, scored_names = merge_columns(np.array(labels_of(source)), source.label_names, source.merged)
    assert scored.shape == (4, 17) and same(
        scored[:, scored_names.index("Cardiomegaly or Pericardial effusion")], [1, 0, NAN, 0]
    )


@pytest.mark.parametrize(
    "values, expected",
    [
        ((1, 0), 1),
        ((1, NAN), 1),
        ((0, 0), 0),
        ((0, NAN), NAN),
        ((NAN, NAN), NAN),
        ((0.3, 0.7), 0.7),
        ((0.7, NAN), NAN),
        ((), NAN),
    ],
)
def test_any_of_several(values, expected):
    assert same([any_of(values)], [expected])


def test_a_mapping_may_ask_for_more(table):
    path = table("label,data,words\nEmphysema,emphysema,\nRippenbruch,fracture,rib fracture\n")
    config, mapping = read_label_flags(CONFIG, mapping=path)
    assert config.label_names == [*CT_CLIP_LABELS, "Rippenbruch"]
    assert config.label_prompts([config.label_names[-1]]) == [
        ["rib fracture is present.", "rib fracture is not present."]
    ]
    source = LabelSpace.of(config, mapping).apply(source_of(("emphysema", "fracture"), (1, 0)))
    assert labels_of(source)[0][-1] == 0


def test_findings_that_the_model_has_not_are_refused_unless_published(table):
    with pytest.raises(DataError, match=r"'Emphysem' is not a finding of the model, which has .* `words`"):
        open_source("phantoms", "train", CONFIG, mapping=table("label,data\nEmphysem,x\n"))
    few = MedCTConfig(id2label={0: "Emphysema", 1: "Arterial wall calcification"})
    space = LabelSpace.of(few, read_labels("radfinder-standard"))
    assert space.columns == ("emphysema",), "a group of which the model has a part is left out"
    with pytest.raises(DataError, match="is not a finding of the model"):
        LabelSpace.of(MedCTConfig(id2label={0: "Nodule"}), read_labels("radfinder-standard"))


def test_any_source_takes_a_mapping(table):
    path = table("label,data\nFluid,Pleural effusion\nFluid,Pericardial effusion\n")
    config = MedCTConfig(id2label={0: "Fluid", 1: "Bone"})
    cohort = PhantomCohort("B", train_patients=1, tune_patients=20, eval_patients=1)
    rows = list(open_source("phantoms", "tune", config, mapping=path, phantoms=cohort).stream())
    drawn = list(open_source("phantoms", "tune", CONFIG, phantoms=cohort).stream())
    both = [CT_CLIP_LABELS.index(name) for name in ("Pleural effusion", "Pericardial effusion")]
    assert [row["labels"][0] for row in rows] == [max(row["labels"][index] for index in both) for row in drawn]
    assert all(math.isnan(row["labels"][1]) for row in rows)


def test_labels_that_are_mapped_already(table):
    config, mapping = read_label_flags(CONFIG, mapping=table("label,data\nCardiomegaly|Pericardial effusion,heart\n"))
    mapped = LabelSpace.of(config, mapping).apply(source_of(("heart",), (1,)))
    assert LabelSpace.of(config, mapping).apply(mapped) == mapped, "the same once more, as shards have it"
    one = LabelSpace.of(MedCTConfig(id2label={0: "Cardiomegaly", 1: "Emphysema"})).apply(mapped)
    assert same(labels_of(one), [[NAN, NAN]]) and one.merged == (), "a part of what is told together is unknown"
    config, other = read_label_flags(CONFIG, mapping=table("label,data\nCardiomegaly,heart\n"))
    with pytest.raises(DataError, match=r"its labels are mapped already\. Leave out --mapping"):
        LabelSpace.of(config, other).apply(mapped)


def test_what_the_data_lack_is_named(table):
    config, mapping = read_label_flags(CONFIG, mapping=table("label,data\nEmphysema,bullae\n"))
    with pytest.raises(
        DataError, match=r"1 studies: it has no label 'bullae', but a, b\. Say with --mapping \(or --keep_mapping, "
    ):
        LabelSpace.of(config, mapping).apply(source_of(("a", "b"), (1, 0)))


@pytest.mark.parametrize(
    "name, classes, findings", [("radfinder-standard", 16, 17), ("radfinder-extended", 18, 18), ("hlip", 14, 15)]
)
def test_published_mappings(name, classes, findings):
    table = read_labels(name)
    assert set(published_mappings()) == {"radfinder-standard", "radfinder-extended", "hlip"}
    assert len({row.findings for row in table.rows}) == classes and len(table.findings) == findings
    assert set(table.findings) <= set(CT_CLIP_LABELS)
    assert "Source: " in table.source and table.is_published
    assert ("Mosaic attenuation pattern" in table.findings) == (name == "radfinder-extended")
    merged = [row for row in table.rows if len(row.findings) > 1]
    assert [row.data for row in merged] == ([] if name == "radfinder-extended" else ["calcification"])


def test_merged_columns_keep_their_place():
    scores = np.array([[0.1, 0.2, 0.3, 0.9], [0.6, 0.5, 0.4, 0.1]])
    found, names = merge_columns(scores, ["a", "b", "c", "d"], [Merged(("b", "d"))])
    assert names == ("a", "b or d", "c")
    assert found.tolist() == [[0.1, 0.9, 0.3], [0.6, 0.5, 0.4]]


# Words for labels


@pytest.mark.parametrize(
    "cell, expected",
    [
        ("1", 1), ("0.0", 0), (" 1 ", 1), ("0,5", 0.5), (",5", 0.5), ("yes", 1), ("No", 0), ("TRUE", 1), ("false", 0),
        ("ja", 1), ("Nein", 0), ("oui", 1), ("non", 0), ("sí", 1), ("Evet", 1), ("hayır", 0), ("да", 1), ("нет", 0),
        ("有", 1), ("无", 0), ("はい", 1), ("いいえ", 0), ("present", 1), ("absent", 0), ("positive", 1), ("", NAN),
        ("NaN", NAN), ("n/a", NAN), ("unknown", NAN), ("unbekannt", NAN),
    ],
)  # fmt: skip
def test_words_for_labels(cell, expected):
    assert same(check_labels(pd.DataFrame({"a": [cell]}), ["a"], "table")["a"], [expected])


@pytest.mark.parametrize(
    "cell", ["-1", "2", "1,5", "1.000,5", "maybe", "x", "+", "-", "?", "none", "0_1", "inf", "1 1"]
)
def test_what_is_no_label_is_refused(cell):
    with pytest.raises(DataError, match=r"the label 'a' is .* somewhere. Write 1 \(present\), 0 \(not"):
        check_labels(pd.DataFrame({"a": ["0", cell]}), ["a"], "table")


def test_numbers_and_truth_values_stay():
    table = pd.DataFrame({"a": [True, False], "b": [0.25, NAN], "c": [1, 0]})
    found = check_labels(table, ["a", "b", "c"], "table")
    assert same(found.to_numpy(), [[1, 0.25, 1], [0, NAN, 0]])
