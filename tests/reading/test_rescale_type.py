"""What says that values are HU, or that they are not: RescaleType, ImageType, and what GDCM and ITK write."""

import numpy as np
import pytest
import SimpleITK
from pydicom.uid import CTImageStorage
from scan_files import item, make_hu, write_enhanced, write_series

from medct import VolumeError, read_volume

HU = make_hu((6, 16, 12))


def with_air(share: float, air: float = -1000) -> np.ndarray:
    """Tissue, and so many voxels of air."""
    hu = np.random.default_rng(0).integers(-100, 300, HU.shape).astype(np.int16)
    hu.reshape(-1)[: round(share * hu.size)] = air
    return hu


def series(folder, hu, unit="US", slope=1, intercept=-1024):
    def edit(ds, k):
        ds.RescaleType, ds.RescaleSlope, ds.RescaleIntercept = unit, slope, intercept

    return write_series(folder, hu, edit)


@pytest.mark.parametrize(("share", "is_read"), [(0.6, True), (0.1, True), (0.02, True), (0.005, False), (0, False)])
@pytest.mark.parametrize("unit", ["US", "us", "US "])
def test_values_without_a_unit_are_hu_if_they_show_air(share, is_read, unit, tmp_path):
    hu = with_air(share)
    folder = series(tmp_path, hu, unit)
    if is_read:
        volume = read_volume(folder)
        assert np.array_equal(volume.array, hu.T)
        assert "RescaleType is US" in " ".join(volume.notes)
    else:
        with pytest.raises(VolumeError, match="RescaleType is US, not HU, and it shows no air"):
            read_volume(folder)


@pytest.mark.parametrize(
    ("air", "is_read"), [(-1024, True), (-950, True), (-1090, True), (-850, False), (-1150, False), (0, False)]
)
def test_what_is_air(air, is_read, tmp_path):
    folder = series(tmp_path, with_air(0.5, air) + 1024, intercept=-2048)
    if is_read:
        read_volume(folder)
    else:
        with pytest.raises(VolumeError, match="no air"):
            read_volume(folder)


@pytest.mark.parametrize("unit", ["US", "OD", "MGML", "Z_EFF", "anything"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.001, -5)])
def test_the_callers_own_scale(unit, slope, intercept, tmp_path):
    """Instead of a header's that gives another unit, and of both halves only."""
    folder = series(tmp_path, with_air(0.5), unit, slope, intercept)
    volume = read_volume(folder, rescale_slope=1, rescale_intercept=-1024)
    assert np.array_equal(volume.array, with_air(0.5).T)
    assert volume.notes == ()
    if unit != "US":
        for options in ({}, {"rescale_slope": 1}):
            with pytest.raises(VolumeError, match=r"its RescaleType is .* not HU"):
                read_volume(folder, **options)


MAPS = ("MAT_SPECIFIC", "MAT_FRACTIONAL", "MAT_VALUE_BASED", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY")
MODIFIED = ("MAT_REMOVED", "MAT_MODIFIED")


@pytest.mark.parametrize("unit", [None, "", "HU", "HU_MOD", "US", "MGML"])
@pytest.mark.parametrize("kind", [*MAPS, *MODIFIED, "VMI", "STANDARD"])
@pytest.mark.parametrize("is_enhanced", [False, True])
def test_images_of_several_energies(kind, unit, is_enhanced, tmp_path):
    def edit(ds, k=0):
        ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL", kind]
        scale = ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0] if is_enhanced else ds
        scale.RescaleType = unit
        if unit is None:
            del scale.RescaleType

    hu = with_air(0.5)
    source = write_enhanced(tmp_path / "e.dcm", hu, edit) if is_enhanced else write_series(tmp_path, hu, edit)
    is_unit = unit in (None, "", "HU", "HU_MOD") or (unit == "US" and not is_enhanced)
    if kind in MAPS or (kind in MODIFIED and unit not in ("HU", "HU_MOD")):
        with pytest.raises(VolumeError, match=f"its ImageType is {kind}, a map computed from several energies"):
            read_volume(source)
        given = read_volume(source, rescale_slope=1, rescale_intercept=-1024)
        assert np.array_equal(given.array, hu.T)
    elif is_unit:
        assert np.array_equal(read_volume(source).array, hu.T)
    else:
        with pytest.raises(VolumeError, match="its RescaleType is"):
            read_volume(source)


@pytest.mark.parametrize(
    ("kind", "why"), [("MAT_SPECIFIC", "its ImageType is MAT_SPECIFIC"), ("LOCALIZER", "localizer")]
)
def test_one_frame_of_another_type(kind, why, tmp_path):
    def edit(ds):
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            types = ["ORIGINAL", "PRIMARY", *((kind, "NONE") if k == 3 else ("VOLUME", "NONE"))]
            frame.CTImageFrameTypeSequence = [item(FrameType=types)]

    with pytest.raises(VolumeError, match=f"frame 4: .*{why}"):
        read_volume(write_enhanced(tmp_path / "enhanced.dcm", HU, edit))


@pytest.mark.parametrize("is_enhanced", [False, True])
@pytest.mark.parametrize(
    ("attribute", "kind", "said"),
    [
        ("ImageType", "MIP", "projections"),
        ("ImageType", "MPR", None),
        ("VolumetricProperties", "VOLUME", None),
        ("VolumetricProperties", "DISTORTED", "cut out along a curve"),
        ("VolumeBasedCalculationTechnique", "NONE", None),
        ("VolumeBasedCalculationTechnique", "MPR", None),
        ("VolumeBasedCalculationTechnique", "MAX_IP", "projections"),
        ("VolumeBasedCalculationTechnique", "CURVED_MPR", "cut out along a curve"),
        ("VolumeBasedCalculationTechnique", "VOLUME_RENDER", "rendered"),
    ],
)
def test_what_was_computed_from_several_slices(attribute, kind, said, is_enhanced, tmp_path):
    """Of a volume's own planes nothing is said."""

    def edit(ds, k=None):
        described = ["DERIVED", "SECONDARY", "AXIAL", kind] if attribute == "ImageType" else kind
        if k is None and attribute != "ImageType":
            shared = ds.SharedFunctionalGroupsSequence[0]
            shared.CTImageFrameTypeSequence = [item(**{attribute: described})]
        else:
            setattr(ds, attribute, described)

    source = write_enhanced(tmp_path / "e.dcm", HU, edit) if is_enhanced else write_series(tmp_path, HU, edit)
    if said in (None, "projections"):
        volume = read_volume(source)
        assert np.array_equal(volume.array, HU.T)
        assert [said in note for note in volume.notes] == ([True] if said else [])
    else:
        with pytest.raises(VolumeError, match=said):
            read_volume(source)


def test_a_lookup_table_beside_a_slope(tmp_path):
    def edit(ds, k):
        ds.ModalityLUTSequence = [item(LUTDescriptor=[4, 0, 16], ModalityLUTType="HU", LUTData=bytes(8))]

    with pytest.raises(VolumeError, match="ModalityLUTSequence and its RescaleSlope contradict each other"):
        read_volume(write_series(tmp_path, HU, edit))
    volume = read_volume(tmp_path, rescale_slope=1, rescale_intercept=-1024)
    assert np.array_equal(volume.array, HU.T)


def test_hu_are_never_rescaled_again(tmp_path):
    with pytest.raises(VolumeError, match="already rescales"):
        read_volume(series(tmp_path, HU, "HU"), rescale_slope=1, rescale_intercept=0)


def test_enhanced_files_stay_refused(tmp_path):
    def edit(ds):
        ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleType = "US"

    path = write_enhanced(tmp_path / "enhanced.dcm", with_air(0.5), edit)
    with pytest.raises(VolumeError, match="frame 1: its RescaleType is US"):
        read_volume(path)
    volume = read_volume(path, rescale_slope=1, rescale_intercept=-1024)
    assert np.array_equal(volume.array, with_air(0.5).T)


def test_what_simpleitk_writes(tmp_path):
    hu = with_air(0.4)
    image = SimpleITK.GetImageFromArray(hu)
    image.SetSpacing((0.7, 0.8, 2.5))
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(len(hu)):
        slice_ = image[:, :, k]
        position = "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, k))))
        tags = {
            "0008|0060": "CT",
            "0008|0016": str(CTImageStorage),
            "0020|000e": "2.25.9",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0032": position,
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.Execute(slice_)
    assert np.array_equal(read_volume(tmp_path).array, hu.T)
