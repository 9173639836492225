"""NIfTI-1 and NIfTI-2, single files and pairs, plain or gzip.

Unusual: nibabel reads the header only. The voxels go from the inflated stream straight into the array, at half
nibabel's time and memory, and to the end of the stream, because nibabel by itself never reads the gzip checksum. Where
qform and sform disagree the sform is used, as nibabel does and other readers do not. The qform is computed
here, because nibabel refuses quaternions that rounding made longer than 1, and signs of the third axis but 1 and -1.

Source: NIfTI-1 and NIfTI-2 standards.
"""

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .byte_sources_medct import (
    COPY_AGAIN,
    ByteSource,
    Finder,
    base_name,
    check_promise,
    of_bytes,
    open_inflated,
    read_array,
)
from .volume_medct import (
    NO_SECOND_RESCALE,
    REMARKED_VOXELS_OFF,
    CTVolume,
    VolumeError,
    check_affine,
    check_voxels,
    drop_singletons,
    refuse_second_rescale,
    rescale_to_hu,
    voxels_off,
)

try:
    import nibabel
except ImportError:
    nibabel = None

_HEADER_BYTES = (348, 540)
_MAX_OFFSET = 2**26
_MAX_QUATERNION = 1.01
"""Length of the vector of a quaternion, which is 1 at most but for rounding."""
_FLOAT32_NOISE = 1e-7
"""Below it, the square of the fourth number, which a header leaves out, is taken for 0, as in niftilib."""
_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""By the code of the header: unknown, which is millimetres everywhere, metres, millimetres, microns."""
_SPATIAL_UNIT = 0b111
_NO_NIFTI = "Pass a .nii or .nii.gz file"


def is_nifti(head: bytes) -> bool:
    """Whether the first four bytes are the length of a NIfTI header, in either byte order."""
    return len(head) >= 4 and any(int.from_bytes(head[:4], order) in _HEADER_BYTES for order in ("little", "big"))


def read_nifti(source: ByteSource, affine: np.ndarray | None, rescale: bool, find: Finder) -> CTVolume:
    """One NIfTI file.

    Args:
        source: Its bytes.
        find: For the voxels of a pair, which lie in a second file.
        affine: Instead of the header's.
        rescale: Whether the caller will compute HU.

    Returns:
        The volume with the header's scale applied.
    """
    if nibabel is None:
        raise VolumeError(source.name, "NIfTI files need nibabel", "Install it: pip install nibabel")
    with source.open() as file:
        stream = open_inflated(file)
        header = _read_header(source, stream)
        shape, dtype, offset = _layout(source, header)
        if not _is_pair(header):
            check_promise(source, math.prod(shape) * dtype.itemsize, compressed=stream is not file)
        check_voxels(source.name, shape, dtype)
        scale = header_scale(source.name, header, rescale)
        affine, notes = header_affine(source.name, header, affine, shape)
        notes = (*notes, *_scale_remarks(header))
        if not _is_pair(header):
            array = _read_voxels(source, stream, file, offset - int(header["sizeof_hdr"]), shape, dtype)
            return CTVolume(rescale_to_hu(array, *scale), affine, source.name, notes)
    voxels = _voxels_of_pair(source, find)
    with voxels.open() as file:
        array = _read_voxels(voxels, open_inflated(file), file, offset, shape, dtype)
    return CTVolume(rescale_to_hu(array, *scale), affine, source.name, notes)


def _read_voxels(
    source: ByteSource, stream: Any, file: Any, skip: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    check_promise(source, math.prod(shape) * dtype.itemsize, compressed=stream is not file)
    _skip(source, stream, skip)
    return read_array(source, stream, shape, dtype, is_alone=skip == 0)


def _is_pair(header: Any) -> bool:
    return bytes(header["magic"])[:2] == b"ni"


def _voxels_of_pair(source: ByteSource, find: Finder) -> ByteSource:
    """The .img of a .hdr."""
    stem = base_name(source.name).removesuffix(".gz").rpartition(".")[0]
    voxels = find([f"{stem}.{suffix}" for suffix in ("img", "img.gz", "IMG")])
    if voxels is None:
        raise VolumeError(source.name, "its voxels lie in a second file (.img)", "Copy both files to one folder")
    return voxels


def read_nibabel_image(image: Any, affine: np.ndarray | None, rescale: bool) -> CTVolume:
    """Read a nibabel image of any format, such as a column of `datasets.Nifti()` decodes to.

    Args:
        image: The image.
        affine: `(4, 4)`, voxel indices to RAS+ mm, to use instead of the image's own.
        rescale: Whether the caller will compute HU from stored values.

    Returns:
        The volume with the header's scale applied.

    Raises:
        VolumeError: If it is not a usable volume, or both header and caller rescale.
    """
    source, header, data = "nibabel image", image.header, image.dataobj
    shape = drop_singletons(image.shape)
    check_voxels(source, shape, np.dtype(getattr(data, "dtype", np.float64)))
    is_nifti_header = hasattr(header, "get_xyzt_units")
    if affine is None and is_nifti_header:
        _, notes = header_affine(source, header, None, shape)
        unit_mm = _unit_mm(source, header)
        affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ np.asarray(image.affine, float)
        check_affine(source, affine)
        affine = _with_written_spacing(affine, _zooms(header) * unit_mm, shape)
    elif affine is None and nibabel is not None and isinstance(image, nibabel.AnalyzeImage):
        raise VolumeError(source, "Analyze 7.5 does not say where right and left are", "Pass `affine=`")
    else:
        affine, notes = image.affine if affine is None else affine, ()
    array, slope, intercept = _values_of_image(source, image, shape, rescale)
    return CTVolume(rescale_to_hu(array.reshape(shape), slope, intercept), np.asarray(affine, float), source, notes)


def _values_of_image(source: str, image: Any, shape: tuple[int, ...], rescale: bool) -> tuple[np.ndarray, float, float]:
    """Values of a nibabel image, and the slope and intercept that they still lack."""
    data = image.dataobj
    try:
        # Unscaled, because nibabel would scale in float64. Other proxies (AFNI, PAR/REC, MINC) scale in their own ways.
        if _is_plain_proxy(data):
            array, slope, intercept = _stored_values(source, image, shape), data.slope, data.inter
        else:
            array, slope, intercept = np.asanyarray(data), 1, 0
        is_scaled = rescale and _scales_itself(data, array)
    except VolumeError:
        raise
    except Exception as error:  # nibabel's own, struct's, zlib's, numpy's
        raise VolumeError(source, f"its voxels cannot be read ({error})", COPY_AGAIN) from error
    if rescale and (slope, intercept) != (1, 0):
        refuse_second_rescale(source, slope, intercept)
    if is_scaled:
        raise VolumeError(source, "its format already rescales, in a way of its own", NO_SECOND_RESCALE)
    return array, slope, intercept


def _stored_values(source: str, image: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What the file of an image holds; of NIfTI to its end, so that its length and checksum are judged as of a path."""
    data = image.dataobj
    # The base of NIfTI. Files of other formats may hold more behind their voxels.
    if not isinstance(image, nibabel.AnalyzeImage) or getattr(data, "order", "F") != "F":
        return np.asanyarray(data.get_unscaled())
    # A file object has one position for all threads.
    with data._lock, nibabel.openers.ImageOpener(data.file_like) as stream:
        stream.seek(data.offset)
        return read_array(of_bytes(b"", source), stream, shape, data.dtype, is_alone=data.offset == 0)


def _is_plain_proxy(data: Any) -> bool:
    return nibabel is not None and type(data) is nibabel.arrayproxy.ArrayProxy


def _scales_itself(data: Any, array: np.ndarray) -> bool:
    """Whether a proxy of another format scales; one that does not tell what its file holds counts as such."""
    if _is_plain_proxy(data) or not getattr(data, "is_proxy", False):
        return False
    return not (hasattr(data, "get_unscaled") and np.array_equal(data.get_unscaled(), array))


def _read_header(source: ByteSource, stream: Any) -> Any:
    try:
        block = stream.read(_HEADER_BYTES[0])
        header_class = nibabel.Nifti1Header
        if any(int.from_bytes(block[:4], order) == _HEADER_BYTES[1] for order in ("little", "big")):
            header_class = nibabel.Nifti2Header
            block += stream.read(_HEADER_BYTES[1] - _HEADER_BYTES[0])
    except Exception as error:  # gzip and isal each raise their own
        raise VolumeError(source.name, f"the gzip stream is damaged ({error})", COPY_AGAIN) from error
    try:
        header = header_class.from_fileobj(io.BytesIO(block), check=False)
        magic = bytes(header["magic"])[:2]
    except Exception as error:  # as above
        raise VolumeError(source.name, f"it is not a NIfTI file ({error})", _NO_NIFTI) from error
    if magic not in (b"n+", b"ni"):
        raise VolumeError(
            source.name,
            "it is an Analyze 7.5 header, which does not say where right and left are",
            "Convert it to NIfTI, or pass `nibabel.load(path)` and `affine=`",
        )
    return header


def _layout(source: ByteSource, header: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type on disk, and where the voxels begin."""
    try:
        shape = drop_singletons(header.get_data_shape())
        dtype = header.get_data_dtype()
        # Four bytes that announce extensions lie between the header of a single file and its voxels.
        first = 0 if _is_pair(header) else int(header["sizeof_hdr"]) + 4
        offset = int(header["vox_offset"]) or first
    except Exception as error:  # as above
        said = "its header gives no known type of numbers, or no place where its voxels begin"
        raise VolumeError(source.name, said, COPY_AGAIN) from error
    if min(shape, default=0) <= 0 or not first <= offset <= _MAX_OFFSET:
        raise VolumeError(
            source.name,
            f"its header is damaged (shape {shape}, voxels from byte {offset})",
            COPY_AGAIN,
        )
    return shape, dtype, offset


def _skip(source: ByteSource, stream: Any, count: int) -> None:
    try:
        missing = len(stream.read(count)) != count
    except Exception as error:  # as above
        raise VolumeError(source.name, f"the gzip stream is damaged ({error})", COPY_AGAIN) from error
    if missing:
        raise VolumeError(source.name, "its voxels cannot be read (it ends before them)", "Copy the file again")


def header_scale(source: str, header: Any, rescale: bool) -> tuple[float, float]:
    """Slope and intercept of a header; 1 and 0 where it has none.

    Args:
        source: What to call the file in messages.
        header: nibabel's.
        rescale: Whether the caller will compute HU from stored values; the header must not rescale then.
    """
    try:
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # as above
        raise VolumeError(source, f"its scl_slope and scl_inter are damaged ({error})", "Correct the header") from error
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    if rescale and (slope, intercept) != (1, 0):
        refuse_second_rescale(source, slope, intercept)
    return slope, intercept


def _scale_remarks(header: Any) -> tuple[str, ...]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    is_none = slope == 0 or not np.isfinite(slope)
    if is_none and np.isfinite(intercept) and intercept != 0:
        return (
            f"its scl_slope is {slope:g}, which stands for no scale: its scl_inter of {intercept:g} is not applied",
        )
    return ()


def header_affine(
    source: str, header: Any, affine: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine of a header, unless the caller provides one.

    Args:
        source: What to call the file in messages.
        header: nibabel's.
        affine: `(4, 4)`, voxel indices to RAS+ mm, to use instead of the header's.
        shape: `(i, j, k)`, voxels.

    Returns:
        `(4, 4)`, voxel indices to RAS+ mm, and remarks on it.

    Raises:
        VolumeError: If the header's orientation is missing or unusable.
    """
    if affine is not None:
        return affine, ()
    with np.errstate(all="ignore"):
        has_qform, has_sform = int(header["qform_code"]) != 0, int(header["sform_code"]) != 0
        if not has_qform and not has_sform:
            raise VolumeError(source, "its header holds no orientation", "Pass the `affine=` of the scan")
        zooms = _zooms(header)
        if not has_sform and not (zooms > 0).all():
            raise VolumeError(
                source, f"its spacing is {tuple(zooms.tolist())} mm", "Correct the header, or pass `affine=`"
            )
        qform = _qform(header) if has_qform else None
        best = np.asarray(header.get_sform(), float) if has_sform else qform
        if best is None:
            raise VolumeError(
                source, "its orientation cannot be read (the quaternion is longer than 1)", "Pass `affine=`"
            )
        unit_mm = _unit_mm(source, header)
        best = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ best
        check_affine(source, best)
        notes = [] if unit_mm == 1 else ["its unit was converted to mm"]
        if has_sform:
            zooms = np.abs(zooms)  # nibabel takes them so; a sign says nothing beside an sform
            notes += _remarks(best, has_qform, qform, zooms * unit_mm, unit_mm, shape)
            best = _with_written_spacing(best, zooms * unit_mm, shape)
        return best, tuple(notes)


def _unit_mm(source: str, header: Any) -> float:
    unit_mm = _UNITS_MM.get(int(header["xyzt_units"]) & _SPATIAL_UNIT)
    if unit_mm is None:
        raise VolumeError(source, "its unit of length is not known (`xyzt_units`)", "Correct it, or pass `affine=`")
    return unit_mm


def _zooms(header: Any) -> np.ndarray:
    """The spacing of a header, `(3,)`, in its unit."""
    return np.asarray(header["pixdim"][1:4], float)


def _with_written_spacing(affine: np.ndarray, zooms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An affine with the spacing of `pixdim`, if that moves no voxel noticeably.

    Converters compute the step of an sform from float32 positions: dcm2niix makes 1.499939 mm of 1.5 mm where the table
    stands at -1024.7 mm, and of 200 slices one less after resampling.
    """
    if not ((zooms > 0) & (zooms < np.inf)).all():
        return affine
    exact = affine.copy()
    exact[:3, :3] *= zooms / np.linalg.norm(affine[:3, :3], axis=0)
    return exact if voxels_off(affine, shape, exact) <= REMARKED_VOXELS_OFF else affine


def _qform(header: Any) -> np.ndarray | None:
    """The affine of a header's quaternion, in its unit; none if that is not a rotation."""
    vector = np.array([float(header[f"quatern_{letter}"]) for letter in "bcd"])
    length = np.linalg.norm(vector)
    if not length <= _MAX_QUATERNION:
        return None
    b, c, d = vector
    a = np.sqrt(max(0.0, 1 - vector @ vector))
    if a * a < _FLOAT32_NOISE:
        a, (b, c, d) = 0.0, vector / length
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    # The standard knows 1 and -1; 0, which many write, and what is not a number stand for 1.
    third = -1.0 if float(header["pixdim"][0]) < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = turn * _zooms(header) * (1, 1, third)
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _remarks(
    sform: np.ndarray,
    has_qform: bool,
    qform: np.ndarray | None,
    zooms: np.ndarray,
    unit_mm: float,
    shape: tuple[int, ...],
) -> Iterator[str]:
    """What contradicts an sform, which is used; all but `qform` in mm."""
    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.allclose(lengths, zooms, rtol=1e-2):
        yield "its pixdim disagrees with its sform, which is used"
    if has_qform and (zooms > 0).all():
        if qform is not None:
            qform = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ qform
        if qform is None or not voxels_off(sform, shape, qform) <= REMARKED_VOXELS_OFF:
            yield "its qform disagrees with its sform, which is used"
