"""Real scans, a test per folder: read as they should be, or refused for the right reason."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from medct import CTVolume, MedCTImageProcessor, VolumeError, VolumeWarning, read_volume


@pytest.fixture
def folder(shared):
    """`folder("07")`: the folder with that number."""

    def find(number: str) -> Path:
        found = sorted((shared / "realdata").glob(f"{number}_*"))
        if not found:
            pytest.skip(f"folder {number} of real scans is not at hand")
        return found[0]

    return find


def refused(source, reason: str, **options) -> None:
    with pytest.raises(VolumeError, match=reason):
        read_volume(source, **options)


def pixel_values(processor: MedCTImageProcessor, source) -> torch.Tensor:
    return processor(source, return_tensors="pt")["pixel_values"][0, 0]


@pytest.fixture
def cptac(folder, tmp_path) -> Path:
    """The 99 slices of folder 01, unpacked."""
    with tarfile.open(next(folder("01").glob("*.tar.xz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_01_equals_01b(cptac, folder):
    volume = read_volume(cptac)
    assert (volume.array.shape, volume.array.dtype) == ((512, 512, 99), np.int16)
    assert (volume.array.min(), volume.array.max()) == (-1024, 3071)
    assert volume.spacing_mm == pytest.approx((0.564453, 0.564453, 3.0))
    lps, ras = (next(folder("01b").glob(f"*{name}.nii.gz")) for name in ("LPS", "RAS"))
    # The LPS file holds means of 4 x 4 voxels; made of the DICOM voxels they are the same up to rounding.
    means = volume.array.astype(np.float32).reshape(128, 4, 128, 4, 99).mean(axis=(1, 3))
    affine = volume.affine @ np.diag([4.0, 4, 1, 1])
    affine[:3, 3] += volume.affine[:3, :2] @ (1.5, 1.5)
    reduced = read_volume(lps)
    np.testing.assert_allclose(reduced.affine, affine, atol=1e-3)
    np.testing.assert_allclose(reduced.array, means, atol=1)
    processor = MedCTImageProcessor(image_size=(100, 120, 120), target_spacing_mm=(3.0, 2.5, 2.5))
    difference = pixel_values(processor, CTVolume(means, affine)) - pixel_values(processor, lps)
    assert difference.abs().max() < 1.1e-3
    whole, coarse = pixel_values(processor, cptac), pixel_values(processor, ras)
    for other in (pixel_values(processor, lps), coarse):
        assert torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1] > 0.93
        for flipped in ((0,), (1,), (2,)):
            mirrored = torch.stack([whole.flatten(), other.flip(flipped).flatten()])
            assert torch.corrcoef(mirrored)[0, 1] < 0.85


def test_01_as_a_list_in_any_order_and_with_a_slice_missing(cptac):
    files = sorted(path for path in cptac.rglob("*") if path.is_file())
    some = np.random.default_rng(0).permutation(len(files))
    assert np.array_equal(read_volume([files[k] for k in some]).array, read_volume(cptac).array)
    for k in (50, 20):
        del files[k]
    refused(files, r"uneven \(usually 3.000 mm, but (6|9).000 mm between")
    with pytest.warns(VolumeWarning, match="interpolated to 99 even ones"):
        assert read_volume(files, resample_irregular=True).array.shape == (512, 512, 99)


def test_03_reads_and_a_mask_is_refused(folder):
    volume = read_volume(folder("03") / "lung1_image_inplane2x.nii.gz")
    assert volume.array.shape == (256, 256, 48)
    assert volume.spacing_mm == (1.140625, 1.140625, 5.0)
    refused(folder("03") / "lung1_label_inplane2x.nii.gz", "no scan in HU")


@pytest.mark.filterwarnings("error::medct.VolumeWarning")
def test_04_ct_is_read_and_what_is_not_ct_is_remarked_on(folder):
    for name in ("example_ct", "example_ct_sm", "thorax_crop_aorta/ct_cropped", "thorax_crop_pulmonary/ct_cropped"):
        read_volume(folder("04") / f"{name}.nii.gz")
    for name, remark in (("example_mr_sm", "holds no air"), ("example_seg", "labels")):
        with pytest.warns(VolumeWarning, match=remark):
            read_volume(folder("04") / f"{name}.nii.gz")


def test_07_is_the_same_as_dicom_and_as_nifti(folder):
    dicom, nifti = (read_volume(folder("07") / name) for name in ("ct-64Dicom", "ct-64.nii.gz"))
    geometry = np.linalg.inv(nifti.affine) @ dicom.affine
    voxels = np.indices(dicom.array.shape).reshape(3, -1)
    where = np.rint(geometry[:3, :3] @ voxels + geometry[:3, 3:]).astype(int)
    assert np.array_equal(nifti.array[tuple(where)], dicom.array[tuple(voxels)])
    processor = MedCTImageProcessor(image_size=(120, 160, 160), target_spacing_mm=(1.5, 0.75, 0.75))
    torch.testing.assert_close(pixel_values(processor, dicom), pixel_values(processor, nifti), atol=1e-5, rtol=0)
    whole = [pixel_values(MedCTImageProcessor(), volume) for volume in (dicom, nifti)]
    torch.testing.assert_close(*whole, atol=1e-5, rtol=0)


def test_08_all_transfer_syntaxes_decode_to_the_same(folder, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    found = {}
    for path in sorted((folder("08") / "nema_CT1_chest").glob("*.dcm")):
        # One slice is not a volume, so each is given a neighbour.
        for k in range(2):
            slice_ = pydicom.dcmread(path)
            slice_.ImagePositionPatient[2] += 5.0 * k
            slice_.save_as(tmp_path / f"{k}.dcm")
        found[path.stem] = read_volume(tmp_path).array[..., 0]
    assert len(found) == 9
    plain = found["CT1_UNC.explicit_little_endian"].astype(float)
    for name, array in found.items():
        lossy = {"CT1_JLSN": 4, "CT1_J2KI": 400}.get(name, 0)
        # Lossy compression also changes the padding, which is then no longer padding.
        difference = np.abs(array.clip(-1000) - plain.clip(-1000))
        assert difference.max() <= lossy, name
        assert difference.mean() < 30


def test_09_perfusion_is_refused_and_legacy_converted_is_read(folder, cptac):
    for path in folder("09").glob("CT0012*.dcm"):
        refused(path, "RescaleType is US, not HU")
    volume = read_volume(next(folder("09").glob("derived_*.dcm")))
    whole = read_volume(cptac)
    start = np.rint(np.linalg.inv(whole.affine) @ volume.affine[:, 3]).astype(int)
    assert np.array_equal(volume.array, whole.array[..., start[2] : start[2] + 8])


def test_10_scouts_and_captures_are_not_scans(folder, cptac):
    refused(folder("10"), r"no CT slices .*localizer")
    for path in folder("10").glob("*.dcm"):
        refused(path, "no CT slices")
    with pytest.warns(VolumeWarning, match=r"files left out: 3 \(2 x Secondary Capture Image Storage, 1 x localiz"):
        beside = [*cptac.rglob("*.dcm"), *folder("10").glob("*.dcm")]
        assert read_volume(beside).array.shape == (512, 512, 99)


def test_12_broken_series_are_refused_with_their_positions(folder):
    refused(folder("12") / "sliceincrement_001", r"usually 5.000 mm, but 10.000 mm between 28.11 and 38.11")
    refused(folder("12") / "notavolume_001", "occur more than once, such as 61.500 mm")
    refused(folder("12") / "slicecount_001", "MR Image Storage")


def test_13_what_is_not_ct_or_not_hu(folder):
    refused(folder("13") / "sts_002_pet", "12 x Positron Emission Tomography Image Storage")
    for name in ("sts_002_mr_t1", "mr_vestibular_schwannoma"):
        refused(folder("13") / name, "MR Image Storage")
    assert read_volume(folder("13") / "sts_002_ct_thigh").array.shape == (161, 143, 12)
    with pytest.warns(VolumeWarning, match=r"within 0\.\.255"):
        read_volume(folder("13") / "vtkjs_LIDC2_uint8_0-255.nii.gz")
    refused(folder("13") / "CT_pitch.nii.gz", "16.5 degrees off the patient's")
    with pytest.warns(VolumeWarning) as caught:
        read_volume(folder("13") / "CT_pitch.nii.gz", resample_irregular=True)
    assert "resampled from a grid 16.5 degrees off" in str([warning.message for warning in caught])


def test_14_odd_headers(folder):
    with pytest.warns(VolumeWarning, match="name no modality"):
        volume = read_volume([folder("14") / "0.dcm", folder("14") / "1.dcm"])
    assert volume.spacing_mm == (0.625, 0.625, 1.0)
    refused(folder("14") / "rt-utils_oriented_rescale0.001", "RescaleType is US")
    refused(next(folder("14").glob("pydicom-data*.dcm")), "one slice, which is not a volume")


def test_15_a_segmentation_is_not_a_slice(folder):
    with pytest.warns(VolumeWarning, match="1 x Segmentation Storage"):
        volume = read_volume(folder("15"))
    assert volume.array.shape == (512, 512, 3)
    assert volume.array.min() == -1024  # the padding was -3024
