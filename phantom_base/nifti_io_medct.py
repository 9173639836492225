"""NIfTI-1 and NIfTI-2, single files, plain or gzip.

Unusual: nibabel reads the header only. The voxels go from the inflated stream straight into the array, at half
nibabel's time and memory, and to the end of the stream, because nibabel by itself never reads the gzip checksum. Where
qform and sform disagree the sform is used, as nibabel does and other readers do not.

Source: NIfTI-1 and NIfTI-2 standards.
"""

import io
import math
from typing import Any

import numpy as np

from .byte_sources_medct import ByteSource, check_promise, open_inflated, read_array
from .volume_medct import CTVolume, VolumeError, check_affine, check_voxels, refuse_second_rescale, rescale_to_hu

try:
    import nibabel
except ImportError:
    nibabel = None

_HEADER_BYTES = (348, 540)
_MAX_OFFSET = 2**26
_NO_NIFTI = "Pass a .nii or .nii.gz file"


def is_nifti(head: bytes) -> bool:
    """Whether the first four bytes are the length of a NIfTI header, in either byte order."""
    return len(head) >= 4 and any(int.from_bytes(head[:4], order) in _HEADER_BYTES for order in ("little", "big"))


def read_nifti(source: ByteSource, affine: np.ndarray | None, rescale: bool) -> CTVolume:
    """One NIfTI file.

    Args:
        source: Its bytes.
        affine: Instead of the header's.
        rescale: Whether the caller will compute HU.

    Returns:
        The volume with the header's scale applied.
    """
    if nibabel is None:
        raise VolumeError(source.name, "NIfTI files need nibabel", "Install it: pip install nibabel")
    with source.open() as file:
        stream = open_inflated(file)
        compressed = stream is not file
        header = _read_header(source, stream)
        shape, dtype, offset = _layout(source, header)
        check_promise(source, math.prod(shape) * dtype.itemsize, compressed)
        check_voxels(source.name, shape, dtype)
        scale = header_scale(source.name, header, rescale)
        affine, notes = header_affine(source.name, header, affine)
        _skip(source, stream, offset - int(header["sizeof_hdr"]))
        array = read_array(source, stream, shape, dtype)
    return CTVolume(rescale_to_hu(array, *scale), affine, source.name, notes)


def read_nibabel_image(image: Any, affine: np.ndarray | None, rescale: bool) -> CTVolume:
    """A nibabel image of any format, such as `datasets.Nifti()` decodes to."""
    source, header, data = "nibabel image", image.header, image.dataobj
    shape = _drop_singletons(image.shape)
    check_voxels(source, shape, np.dtype(getattr(data, "dtype", np.float64)))
    is_nifti_header = hasattr(header, "get_xyzt_units")
    slope, intercept = getattr(data, "slope", 1), getattr(data, "inter", 0)
    if rescale and (slope, intercept) != (1, 0):
        refuse_second_rescale(source, slope, intercept)
    if affine is None and is_nifti_header:
        _, notes = header_affine(source, header, None)
        affine = _in_mm(header, image.affine)
    else:
        affine, notes = image.affine if affine is None else affine, ()
    try:
        # Unscaled, because nibabel would scale in float64.
        array = np.asanyarray(data.get_unscaled() if hasattr(data, "get_unscaled") else data)
    except Exception as error:  # nibabel's own, struct's, zlib's, numpy's
        raise VolumeError(source, f"its voxels cannot be read ({error})", "Copy or download the file again") from error
    return CTVolume(rescale_to_hu(array.reshape(shape), slope, intercept), np.asarray(affine, float), source, notes)


def _read_header(source: ByteSource, stream: Any) -> Any:
    try:
        block = stream.read(_HEADER_BYTES[0])
        header_class = nibabel.Nifti1Header
        if any(int.from_bytes(block[:4], order) == _HEADER_BYTES[1] for order in ("little", "big")):
            header_class = nibabel.Nifti2Header
            block += stream.read(_HEADER_BYTES[1] - _HEADER_BYTES[0])
    except Exception as error:  # gzip and isal each raise their own
        raise VolumeError(
            source.name, f"the gzip stream is damaged ({error})", "Copy or download the file again"
        ) from error
    try:
        header = header_class.from_fileobj(io.BytesIO(block), check=False)
        magic = bytes(header["magic"])[:2]
    except Exception as error:  # as above
        raise VolumeError(source.name, f"it is no NIfTI file ({error})", _NO_NIFTI) from error
    if magic == b"ni":
        raise VolumeError(source.name, "its voxels lie in a second file (.img)", "Pass `nibabel.load(path)`")
    return header


def _layout(source: ByteSource, header: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type on disk, and where the voxels begin."""
    try:
        shape = _drop_singletons(header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header["vox_offset"]) or int(header["sizeof_hdr"]) + 4
    except Exception as error:  # as above
        raise VolumeError(source.name, f"it is no NIfTI file ({error})", _NO_NIFTI) from error
    if min(shape, default=0) <= 0 or not int(header["sizeof_hdr"]) <= offset <= _MAX_OFFSET:
        raise VolumeError(
            source.name,
            f"its header is damaged (shape {shape}, voxels from byte {offset})",
            "Copy or download the file again",
        )
    return shape, dtype, offset


def _drop_singletons(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A fourth and later axis of length one is a habit of some writers."""
    shape = tuple(int(length) for length in shape)
    return shape[:3] if len(shape) > 3 and set(shape[3:]) == {1} else shape


def _skip(source: ByteSource, stream: Any, count: int) -> None:
    try:
        missing = len(stream.read(count)) != count
    except Exception as error:  # as above
        raise VolumeError(
            source.name, f"the gzip stream is damaged ({error})", "Copy or download the file again"
        ) from error
    if missing:
        raise VolumeError(source.name, "its voxels cannot be read (it ends before them)", "Copy the file again")


def header_scale(source: str, header: Any, rescale: bool) -> tuple[float, float]:
    """Slope and intercept of a header."""
    try:
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # as above
        raise VolumeError(source, f"its scl_slope and scl_inter are damaged ({error})", "Correct the header") from error
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    if rescale and (slope, intercept) != (1, 0):
        refuse_second_rescale(source, slope, intercept)
    return slope, intercept


def header_affine(source: str, header: Any, affine: np.ndarray | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine in mm that a header gives, unless the caller has a better one, and remarks on it."""
    if affine is not None:
        return np.asarray(affine, float), ()
    with np.errstate(all="ignore"):
        try:
            qform_code, sform_code = int(header["qform_code"]), int(header["sform_code"])
            if qform_code == 0 and sform_code == 0:
                raise VolumeError(source, "its header holds no orientation", "Pass the `affine=` of the scan")
            zooms = np.asarray(header["pixdim"][1:4], float)
            if sform_code == 0 and not (zooms > 0).all():
                raise VolumeError(
                    source, f"its spacing is {tuple(zooms.tolist())} mm", "Correct the header, or pass `affine=`"
                )
            best = _in_mm(header, header.get_best_affine())
            check_affine(source, best)
            return best, tuple(_remarks(header, qform_code, sform_code, zooms))
        except VolumeError:
            raise
        except Exception as error:  # as above
            raise VolumeError(
                source, f"its orientation cannot be read ({error})", "Correct the header, or pass `affine=`"
            ) from error


def _in_mm(header: Any, affine: np.ndarray) -> np.ndarray:
    unit_mm = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    return np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ np.asarray(affine, float)


def _remarks(header: Any, qform_code: int, sform_code: int, zooms: np.ndarray):
    if not sform_code:
        return
    sform = header.get_sform()
    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.allclose(lengths, zooms, rtol=1e-2):
        yield "its pixdim disagrees with its sform, which is used"
    if qform_code and (zooms > 0).all():
        qform = header.get_qform()
        if not np.allclose(qform, sform, atol=0.01 * np.abs(sform[:3, :3]).max() + 1e-3):
            yield "its qform disagrees with its sform, which is used"
