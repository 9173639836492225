"""Files shipped to the Hub work where `medct` is not installed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import scan_files
import torch
from hub_server import WITHOUT_MEDCT
from launching import QUICKLY
from safetensors.torch import load_file, save_file

from medct import MedCTModel

ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = {"__init__.py", "__main__.py", "train.py"}
SHIPPED = sorted(path.name for path in ROOT.glob("*.py") if path.name not in NOT_SHIPPED)
ALLOWED = {"torch", "numpy", "transformers"} | set(sys.stdlib_module_names)

READ_AND_RUN = """
import json, sys, numpy, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor

folder, scan, inputs, results, series = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    output = model(**load_file(inputs))
pixel_values = processor(images=scan, text="a b c", return_tensors="pt")["pixel_values"]
assert torch.equal(images(scan, return_tensors="pt")["pixel_values"], pixel_values)
images(series)  # compressed, so another process decodes it
save_file({"logits": output.logits_per_image, "pixel_values": pixel_values}, results)
"""


def run_without_medct(code: str, *arguments: object, home: Path) -> subprocess.CompletedProcess:
    environment = os.environ | QUICKLY | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_MEDCT + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=home, env=environment, check=False)


def test_the_suffix_says_what_ships():
    assert all(name.endswith("_medct.py") for name in SHIPPED)
    assert {"configuration_medct.py", "modeling_medct.py", "volume_io_medct.py"} <= set(SHIPPED)
    elsewhere = [path for path in ROOT.glob("*/**/*_medct.py") if "phantom_base" not in path.parts]
    assert [path for path in elsewhere if not {"tests", ".venv", "build"} & set(path.relative_to(ROOT).parts)] == []


def test_a_saved_folder_works_without_medct(model, processor, batch, nifti, tmp_path):
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == set(SHIPPED)
    scan = nifti(np.random.default_rng(0).integers(-1000, 1000, (6, 7, 5)).astype(np.int16))
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, tmp_path / "inputs.safetensors")
    results = tmp_path / "results.safetensors"
    series = scan_files.write_series(
        tmp_path / "series", scan_files.make_hu(), scan_files.compress(pydicom.uid.JPEGLSLossless)
    )
    run = run_without_medct(READ_AND_RUN, folder, scan, tmp_path / "inputs.safetensors", results, series, home=tmp_path)
    assert run.returncode == 0, run.stderr
    found = load_file(results)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**batch).logits_per_image)
    assert torch.equal(found["pixel_values"], processor(images=scan, return_tensors="pt")["pixel_values"])


def test_the_phantom_base_is_a_hub_repository():
    """Its code files are copies, which `make style` renews."""
    folder = ROOT / "phantom_base"
    assert {path.name for path in folder.glob("*.py")} == set(SHIPPED)
    assert all((ROOT / path.name).read_bytes() == path.read_bytes() for path in folder.glob("*.py"))
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_what_was_loaded_as_remote_code_saves_a_whole_folder(tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(ROOT / "phantom_base", folder)
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoProcessor
folder, first, second = sys.argv[1:]
for source, target in ((folder, first), (first, second)):
    AutoModel.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
    AutoProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
for part, auto_class in ((model.vision_model, AutoModel), (model.config.vision_config, AutoConfig)):
    part.save_pretrained(first + auto_class.__name__)
    again = auto_class.from_pretrained(first + auto_class.__name__, trust_remote_code=True)
    assert type(again).__name__ == type(part).__name__, again
"""
    run = run_without_medct(code, folder, tmp_path / "first", tmp_path / "second", home=tmp_path)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "second").glob("*.py")} == set(SHIPPED)
    assert (tmp_path / "second/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


@pytest.mark.slow
def test_another_process_unpickles_a_remote_processor(converted, tmp_path):
    """As `datasets.map(num_proc=2)` and spawned loaders do."""
    pickled = tmp_path / "processor.pickle"
    write = """
import pickle, sys
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules.")
with open(sys.argv[2], "wb") as file:
    pickle.dump([processor, processor.image_processor], file)
if __name__ == "__main__":
    from datasets import Dataset
    texts = Dataset.from_dict({"text": ["a", "b c"]})
    tokens = texts.map(lambda rows: dict(processor(text=rows["text"])), batched=True, num_proc=2)
    assert len(tokens["input_ids"]) == 2
"""
    read = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    processor, images = pickle.load(file)
assert processor(text=["a b"])["input_ids"] and images.image_size == processor.image_processor.image_size
"""
    run = run_without_medct(write, converted, pickled, home=tmp_path)
    assert run.returncode == 0, run.stderr
    run = run_without_medct(read, pickled, home=tmp_path)
    assert run.returncode == 0, run.stderr


def test_a_classifier_is_loaded_and_asked_without_medct(classifier_folder, converted, nifti, tmp_path):
    scan = nifti(np.random.default_rng(0).integers(-1000, 1000, (6, 7, 5)).astype(np.int16))
    code = """
import sys
from transformers import AutoModel, AutoModelForImageClassification, pipeline
classifier, base, scan, again = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(classifier, trust_remote_code=True)
model.save_pretrained(again)
AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True)
begun = AutoModelForImageClassification.from_pretrained(base, num_labels=3, trust_remote_code=True)
assert type(begun).__module__.startswith("transformers_modules.") and begun.classifier.out_features == 3
assert len(pipeline(model=classifier, trust_remote_code=True, device="cpu")(scan)) == 18
try:
    AutoModel.from_pretrained(classifier, trust_remote_code=True)
except ValueError as error:
    assert "lacks the text encoder" in str(error)
else:
    raise AssertionError
"""
    run = run_without_medct(code, classifier_folder, converted, scan, tmp_path / "again", home=tmp_path)
    assert run.returncode == 0, run.stderr


def test_only_safetensors_are_written(converted):
    assert [path.name for path in converted.iterdir() if path.suffix in (".bin", ".pt", ".pth")] == []
    assert "auto_map" in json.loads((converted / "config.json").read_text(encoding="utf-8"))
    assert MedCTModel.from_pretrained(converted, use_safetensors=True)


def imports(tree: ast.AST):
    """`(module, relative level, whether inside try)` of every import."""
    guarded = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module, node.level, node in guarded
        elif isinstance(node, ast.Import):
            yield from ((alias.name, 0, node in guarded) for alias in node.names)


@pytest.mark.parametrize("name", SHIPPED)
def test_imports_obey_the_rules_of_remote_code(name):
    found = list(imports(ast.parse((ROOT / name).read_text(encoding="utf-8"))))
    assert found or name == "errors_medct.py"
    for module, level, is_guarded in found:
        if level:
            assert level == 1
            assert f"{module}.py" in SHIPPED
        else:
            assert is_guarded or module.split(".")[0] in ALLOWED, module
