"""FaceVerse v4 (Wang et al., CVPR 2022, and its fourth release): 621 coefficients, of which 171 are expression used."""

import functools

from mer_jax.extractors import alignment, face_regressor
from mer_jax.extractors.networks import Network

NAME = "faceverse_v4"
SIZE = 256
# In the checkpoint's order. The last 6 of the expression move the tongue and were never trained.
HEADS = {
    "identity": 156,
    "expression": 177,
    "texture": 251,
    "light": 27,
    "angle": 3,
    "translation_xy": 2,
    "depth": 1,
    "eyes": 4,
}
EXPRESSION = slice(156, 327)

NETWORKS: dict[str, Network] = {
    NAME: Network(
        name=NAME,
        modality="geometry",
        dim=EXPRESSION.stop - EXPRESSION.start,
        licence="MIT; the face model behind the coefficients has terms of its own",
        preprocessing=(
            f"{alignment.describe()}; its box made square about its centre, from there "
            f"{alignment.FACEVERSE_SIDES} sides left, up, right and down, black outside the frame; resized to "
            f"{SIZE} x {SIZE} (bilinear, OpenCV); RGB in [0, 1]; coefficients 156 to 326"
        ),
        input_shape=(SIZE, SIZE),
        prepare=functools.partial(
            alignment.prepare, crop=functools.partial(alignment.faceverse_crop, size=SIZE), size=SIZE
        ),
        load=functools.partial(face_regressor.load, name=NAME, heads=HEADS),
        apply=functools.partial(face_regressor.coefficients, columns=EXPRESSION),
    )
}
