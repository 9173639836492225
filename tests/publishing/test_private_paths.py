"""Nothing that is pushed, pictures included, holds a path of the machine that it was made on."""

import functools
import io
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from adapter_files import RESULTS, save_adapter
from matplotlib.figure import Figure
from matplotlib.text import Text

from medct import CT_CLIP_LABELS
from medct.cli import main
from medct.common.paths import find_paths
from medct.data.phantoms import make_phantom
from medct.publishing.cards import PICTURES
from medct.publishing.push import PushError, push_adapter, push_model, push_shards
from medct.train import run
from medct.training.settings import PHANTOM_BASE, TrainingSettings

draw_once = functools.lru_cache(maxsize=None)(make_phantom)
WARD = "Jane Doe (ward 3)"


@pytest.fixture
def ward(tmp_path) -> Path:
    """Everything lies below a folder that names its owner."""
    folder = tmp_path / WARD
    folder.mkdir()
    return folder


@pytest.fixture
def site(ward) -> Path:
    """Own studies."""
    folder = ward / "site b"
    folder.mkdir()
    rows = []
    for number in range(16):
        study = draw_once(number, "B", 0)
        volume = np.asarray(study["volume"])[::8, ::8, ::8]
        affine = study["affine"] @ np.diag([8, 8, 8, 1])
        nibabel.save(nibabel.Nifti1Image(volume, affine), folder / study["VolumeName"])
        split = "valid" if number < 8 else "tune" if number < 12 else "train"
        rows.append({"file_name": study["VolumeName"], "split": split} | {name: study[name] for name in CT_CLIP_LABELS})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Every text of every picture that is written."""
    texts: list[str] = []
    save = Figure.savefig

    def noting(self, *args, **kwargs):
        texts.extend(text.get_text() for text in self.findobj(Text))
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    return texts


def readable(content: bytes, name: str) -> str:
    """All that can be read in a file, a picture's text included."""
    said = content.decode("utf-8", errors="replace")
    if name.endswith(".png"):
        with PIL.Image.open(io.BytesIO(content)) as image:
            said += " ".join(map(str, image.info.values()))
    return said


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_a_run_is_pushed_without_paths(hub, converted, ward, site, drawn, adaptation, monkeypatch):
    hub.connect(monkeypatch)
    base = shutil.copytree(converted, ward / "ct clip")
    push_model(base, "org/base")
    old = shutil.copytree(site, ward / "old site")
    settings = TrainingSettings(
        model=str(base), data=str(site), keep=str(old), output_dir=str(ward / "run"), adaptation=adaptation,
        strength="1", batch_size=4, bootstrap_resamples=20, num_workers=0, cpu=True, push_to_hub=True,
        hub_model_id="org/site-b", hub_base="org/base", hub_base_revision="main",
    )  # fmt: skip
    run(settings)
    files = hub.files("org/site-b")
    assert {*PICTURES, "results.json", "train_config.json", "README.md"} <= files.keys()
    for name, content in files.items():
        said = readable(content, name)
        assert WARD not in said and "Jane" not in said, name
        if name.endswith((".json", ".md", ".txt")):
            assert find_paths(said) == [], name
    assert "studies of site b" in readable(files["roc.png"], "roc.png").replace("\n", " ")
    assert any("site b" in text for text in drawn)
    assert not any("Jane" in text for text in drawn)
    assert json.loads(files["train_config.json"])["data"] == "site b"
    assert json.loads((ward / "run/train_config.json").read_text(encoding="utf-8"))["data"] == str(site)


def test_shards_are_pushed_without_paths(hub, ward, site, refused, monkeypatch):
    hub.connect(monkeypatch)
    folder = ward / "shards"
    assert main(["prepare", str(site), str(folder), "--model", str(PHANTOM_BASE)]) == 0
    push_shards(folder, "org/shards")
    for name, content in hub.files("org/shards", "dataset").items():
        assert b"Jane" not in content, name
    settings = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert settings["source"] == "site b"
    # It goes on from what was recorded in full.
    other = shutil.copytree(site, ward / "elsewhere" / "site b")
    assert "source" in refused("prepare", other, folder, "--model", PHANTOM_BASE)


def test_shards_whose_studies_are_named_by_paths_are_refused(tmp_path):
    manifest = {"splits": {"train": {"files": [{"scans": ["/home/me/a.nii.gz"]}]}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(PushError, match=r"names a path of this machine \(/home/me/a.nii.gz\)"):
        push_shards(tmp_path, "org/shards")


def test_pictures_of_other_origin_stay_at_home(hub, converted, ward, monkeypatch):
    hub.connect(monkeypatch)
    base = shutil.copytree(converted, ward / "base")
    (base / "overview.png").write_bytes(b"a patient")
    push_model(base, "org/base")
    assert "overview.png" not in hub.files("org/base")


@pytest.mark.parametrize("where", ["README.md", "roc.png"])
def test_a_path_that_the_run_knows_is_refused_whatever_it_is_made_of(hub, converted, ward, where, monkeypatch):
    hub.connect(monkeypatch)
    base = shutil.copytree(converted, ward / "base")
    (base / "train_config.json").write_text(json.dumps({"data": str(ward)}), encoding="utf-8")
    if where == "README.md":
        (base / where).write_text(f"Trained on {ward}.", encoding="utf-8")
    else:
        figure = Figure()
        figure.savefig(base / where, metadata={"Title": f"scans of {ward}"})
    with pytest.raises(PushError, match="names a path of this machine"):
        push_model(base, "org/base")
    assert ("model", "org/base") not in hub.repos


def test_what_an_older_run_wrote_is_cleaned(hub, converted, ward, monkeypatch):
    hub.connect(monkeypatch)
    base = shutil.copytree(converted, ward / "ct-clip")
    push_model(base, "org/base")
    folder = save_adapter(base, ward / "run", results=RESULTS | {"data": f"Trained on {ward}/site b."})
    push_adapter(folder, "org/site-b", base="org/base", base_revision="main")
    assert not any(b"Jane" in content for content in hub.files("org/site-b").values())
