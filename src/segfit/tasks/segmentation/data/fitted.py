"""Pairs that are fitted to one size before they are kept: that saves resizing them, and most of the space."""

from collections.abc import Mapping

import numpy as np

from segfit.data.source import Source, SourceView
from segfit.tasks.segmentation.data.dataset import Pixels, fit_image, fit_pair, read_tensors


class FittedSource(SourceView):
    """A `Source` whose images are fitted to one size (h, w) already: fitting them again changes nothing.

    With `whole_masks`, masks keep their original size, as `EvalDataset` needs them; else they are fitted too.
    """

    def __init__(
        self, source: Source, size: tuple[int, int], fit: str, *, whole_masks: bool = False
    ) -> None:
        super().__init__(source)
        self.size, self.fit, self.whole_masks = size, fit, whole_masks

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Return the image (h, w, 3) uint8, and its mask, (h, w) or as it was, uint8.

        Raises:
            SegFitError: if a file cannot be read; it is named.
        """
        image, mask = read_tensors(self.source, index)
        if self.whole_masks:
            image, _ = fit_image(image, self.size, self.fit)
        else:
            image, mask = fit_pair(image, mask, self.size, self.fit)
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy()), mask.contiguous().numpy()


def fitted_sources(
    sources: Mapping[str, Source], size: tuple[int, int], fit: str
) -> dict[str, tuple[Source, str]]:
    """Return split → (source, what is done to its pairs), as `cache_sources` takes them.

    "train" is for a `TrainDataset` of this size and fit, every other split for an `EvalDataset`. With "crop", images
    and masks are kept as they are read.
    """
    if fit == "crop":
        return {split: (source, "original") for split, source in sources.items()}
    kind = f"{size[1]}x{size[0]}-{fit}"
    return {
        split: (FittedSource(source, size, fit), kind)
        if split == "train"
        else (FittedSource(source, size, fit, whole_masks=True), f"{kind}-whole-masks")
        for split, source in sources.items()
    }
