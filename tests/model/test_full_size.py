"""The published sizes, with random weights: memory of the conversion, and a real scan from file to scores."""

import os
import subprocess
import sys
from pathlib import Path

import ct_clip_reference as reference
import pytest
import torch

from medct import MedCTConfig

GIGABYTE = 10**9

SCORE_A_SCAN = """
import sys, time, torch
from transformers import AutoModel, AutoProcessor
folder, scan = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
(prompts,) = model.config.label_prompts()
started = time.monotonic()
inputs = processor(images=scan, text=prompts, return_tensors="pt")
read = time.monotonic()
with torch.no_grad():
    logits = model(**inputs).logits_per_image
assert logits.shape == (1, 36) and logits.isfinite().all()
assert inputs["pixel_values"].min() == -1 and inputs["pixel_values"].max() == 1
print(f"file to pixel_values {read - started:.1f} s, 18 findings {time.monotonic() - read:.1f} s")
"""


def test_published_sizes_are_the_defaults():
    config = MedCTConfig().vision_config
    assert reference.grid(reference.PUBLISHED_SIZES) == config.grid_size
    assert reference.PUBLISHED_SIZES["dim"] == config.hidden_size


def peak_bytes(*command: object, cwd: Path) -> int:
    """Runs a command and returns its peak memory, mapped files included."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_full_size_checkpoint_converts_and_scores_a_real_scan(shared, tokenizer_folder, tmp_path):
    torch.save(reference.random_checkpoint(reference.PUBLISHED_SIZES), tmp_path / "CT-CLIP.pt")
    size = (tmp_path / "CT-CLIP.pt").stat().st_size
    convert = ("-m", "medct.cli", "convert", "CT-CLIP.pt", "model", "--tokenizer", tokenizer_folder)
    converting = peak_bytes(*convert, cwd=tmp_path)
    print(f"conversion of {size / GIGABYTE:.2f} GB: {converting / GIGABYTE:.2f} GB, {converting / size:.2f} x its size")
    assert converting < 3 * size

    (scan,) = (shared / "realdata/01b_cptac_lscc_chest_nifti_derived").glob("*LPS.nii.gz")
    scoring = peak_bytes("-c", SCORE_A_SCAN, tmp_path / "model", scan, cwd=tmp_path)
    print(f"a scan to 18 scores: {scoring / GIGABYTE:.2f} GB")
    assert scoring < 8 * GIGABYTE
