"""The synthetic hospitals: scanner, protocol and wording of each."""

from dataclasses import dataclass

Point = tuple[float, float, float]
"""`(z, x, y)`, mm."""


@dataclass(frozen=True)
class Site:
    """Scanner, protocol and wording of one synthetic hospital.

    Attributes:
        index: Position in `SITES`; part of every random seed.
        spacing_mm: Voxel size `(z, x, y)`.
        noise_hu: Standard deviation of the noise.
        noise_passes: How often the noise is smoothed: more passes, coarser grain.
        kernel_weights: Weight of each neighbour along `(z, x, y)` in the reconstruction kernel, at most 1/3;
            negative sharpens.
        hu_gain: Calibration slope, with air (-1000 HU) fixed.
        hu_offset: Calibration offset, HU.
        isocentre_mm: Where the patient's centre lies in the volume, `(z, x, y)`.
        lung_hu: Density of normal lung, which depends on the breath-hold.
        blood_hu: Density of heart and vessels, which depends on the contrast medium.
        technique: Sentence for `Technique_EN`.
        present: Templates for a finding that is present; `{phrase}` or `{Phrase}` stands for its name.
        absent: Templates for a finding that is absent.
        impression: Template for the findings, joined by commas.
        normal: Impression of a study without findings.
        extent_mm: What a scan covers, `(z, x, y)`.
    """

    index: int
    spacing_mm: Point
    noise_hu: float
    noise_passes: int
    kernel_weights: Point
    hu_gain: float
    hu_offset: float
    isocentre_mm: Point
    lung_hu: float
    blood_hu: float
    technique: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    impression: str
    normal: str
    extent_mm: Point = (300.0, 350.0, 350.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along `(z, x, y)`."""
        return tuple(int(extent / step) for extent, step in zip(self.extent_mm, self.spacing_mm, strict=True))


SITES: dict[str, Site] = {
    "A": Site(
        index=0,
        spacing_mm=(5.0, 3.0, 3.0),
        noise_hu=20.0,
        noise_passes=0,
        kernel_weights=(0.0, -0.06, -0.06),
        hu_gain=1.0,
        hu_offset=0.0,
        isocentre_mm=(0.0, 0.0, 0.0),
        lung_hu=-830.0,
        blood_hu=170.0,
        technique="Contrast-enhanced chest CT, sharp kernel, 5 mm slices.",
        present=("{Phrase} is present.", "There is {phrase}.", "{Phrase} is observed."),
        absent=("{Phrase} is not present.", "No {phrase} is detected."),
        impression="Findings: {phrases}.",
        normal="No finding is present.",
    ),
    "B": Site(
        index=1,
        spacing_mm=(4.0, 3.4, 3.4),
        noise_hu=60.0,
        noise_passes=2,
        kernel_weights=(0.1, 0.25, 0.25),
        hu_gain=1.05,
        hu_offset=35.0,
        isocentre_mm=(-14.0, 4.0, 18.0),
        lung_hu=-780.0,
        blood_hu=100.0,
        technique="Low-dose thoracic computed tomography, soft kernel, 4 mm reconstruction.",
        present=("{Phrase} noted.", "Images show {phrase}.", "Appearances in keeping with {phrase}."),
        absent=("No sign of {phrase}.", "Study free of {phrase}."),
        impression="Conclusion: {phrases}.",
        normal="Conclusion: unremarkable examination of the thorax.",
    ),
    "C": Site(
        index=2,
        spacing_mm=(6.0, 2.8, 2.8),
        noise_hu=45.0,
        noise_passes=1,
        kernel_weights=(0.15, -0.1, -0.1),
        hu_gain=0.96,
        hu_offset=-25.0,
        isocentre_mm=(10.0, -8.0, -12.0),
        lung_hu=-870.0,
        blood_hu=45.0,
        technique="Unenhanced scan of the chest, small field of view, 6 mm slabs.",
        present=("Evidence of {phrase}.", "{Phrase}, as before.", "One sees {phrase}."),
        absent=("Without {phrase}.", "{Phrase} excluded."),
        impression="Opinion: {phrases}.",
        normal="Opinion: no abnormality.",
        extent_mm=(270.0, 310.0, 310.0),
    ),
}
