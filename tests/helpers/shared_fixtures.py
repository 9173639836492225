"""Fixtures of all tests: small models, tokenizers and scans that the tests make themselves."""

import copy
import functools
import json
import locale
import os
from collections.abc import Iterator
from pathlib import Path

import ct_clip_reference as reference
import nibabel
import numpy as np
import pytest
import torch
from hub_server import HubServer

from medct import MedCTForImageClassification, MedCTModel, MedCTProcessor
from medct.cli import main
from medct.common.errors import FAILED
from medct.data.phantoms import make_phantom
from medct.pipeline_medct import ZeroShotCTClassificationPipeline
from medct.publishing.convert_ct_clip_to_hf import convert

ROOT = Path(__file__).resolve().parents[2]
# Tensors recorded from the original, and real scans.
SHARED = Path(os.environ.get("MEDCT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def _same_locale() -> Iterator[None]:
    """SimpleITK sets the process's locale to "C" when it writes DICOM, in which Python opens files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


_draw = functools.lru_cache(maxsize=1000)(make_phantom)


@pytest.fixture(autouse=True, scope="session")
def _phantoms_are_drawn_once() -> Iterator[None]:
    """The same few patients serve most tests; each gets a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medct.data.make_phantom", lambda *patient: copy.deepcopy(_draw(*patient)))
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with nothing but `vocab.txt`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "not", "present", ".", *letters]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small CT-CLIP checkpoint with random weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "ct_clip.pt"
    torch.save(reference.random_checkpoint(reference.SIZES), path)
    return path


@pytest.fixture(scope="session")
def sizes_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sizes") / "sizes.json"
    path.write_text(json.dumps(reference.SIZES), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def converted(tmp_path_factory, checkpoint, sizes_file, tokenizer_folder) -> Path:
    """The small checkpoint as a Hub folder."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(checkpoint, folder, str(tokenizer_folder), sizes_file)
    return folder


@pytest.fixture(scope="session")
def classifier_folder(converted, tmp_path_factory) -> Path:
    """A classifier with a head that tells scans apart, and its processor."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    torch.manual_seed(0)
    model = MedCTForImageClassification.from_pretrained(converted)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    MedCTProcessor.from_pretrained(converted).save_pretrained(folder)
    return folder


@pytest.fixture
def model(converted) -> MedCTModel:
    return MedCTModel.from_pretrained(converted).eval()


@pytest.fixture
def processor(converted) -> MedCTProcessor:
    return MedCTProcessor.from_pretrained(converted)


@pytest.fixture
def pipe(model, processor) -> ZeroShotCTClassificationPipeline:
    """The small model's pipeline."""
    return ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three volumes and three texts of the small model, the last text padded."""
    generator = torch.Generator().manual_seed(1)
    sizes = reference.SIZES
    volume = (3, 1, sizes["frames"], *sizes["image_size"])
    attention_mask = torch.ones(3, 7, dtype=torch.long)
    attention_mask[2, 4:] = 0
    return {
        "pixel_values": torch.rand(volume, generator=generator) * 2 - 1,
        "input_ids": torch.randint(5, sizes["text_config"]["vocab_size"], (3, 7), generator=generator),
        "attention_mask": attention_mask,
    }


@pytest.fixture
def nifti(tmp_path):
    """Writes a NIfTI file: `nifti(array, affine, name)`, with spacing 3 x 2 x 4 mm towards L, P, S by default."""

    def write(array: np.ndarray, affine: np.ndarray | None = None, name: str = "scan.nii.gz") -> Path:
        path = tmp_path / name
        affine = np.diag([-3.0, -2.0, 4.0, 1.0]) if affine is None else affine
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        return path

    return write


@pytest.fixture
def shared() -> Path:
    """Recorded tensors and real scans, where they are available."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not at hand")
    return SHARED


@pytest.fixture
def refused(capfd):
    """`refused("prepare", ...)`: runs a command that must fail, and returns its one line on stderr."""

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == FAILED
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return refused


@pytest.fixture
def ended(capfd):
    """`ended("predict", ...)`: the exit status of a command, stdout and stderr."""

    def ended(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()  # what was printed before
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return ended


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub of this test's own, on loopback; see `hub_server.py`."""
    server = HubServer()
    yield server
    server.close()


class FakeStream:
    """Stands for a stream of a GPU, and for the contexts that make it, or its GPU, the current one."""

    def __init__(self, *_):
        self.synchronize = lambda: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def fake_gpu(monkeypatch):
    """Enough of one to run the thread that makes items for it."""
    for name in ("Stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, FakeStream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
