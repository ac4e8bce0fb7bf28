"""3DDFA-V3 (Wang et al., CVPR 2024): 257 coefficients of a Basel-type face model, of which 64 are expression."""

import functools

from mer_jax.extractors import alignment, face_regressor
from mer_jax.extractors.networks import Network

NAME = "3ddfa_v3"
SIZE = 224
# In the checkpoint's order: identity, expression, albedo, angles, spherical harmonics of the light, translation.
HEADS = {"identity": 80, "expression": 64, "albedo": 80, "angle": 3, "light": 27, "translation_xy": 2, "depth": 1}
EXPRESSION = slice(80, 144)

NETWORKS: dict[str, Network] = {
    NAME: Network(
        name=NAME,
        modality="geometry",
        dim=EXPRESSION.stop - EXPRESSION.start,
        licence="MIT; the face model behind the coefficients has terms of its own",
        preprocessing=(
            f"{alignment.describe()}; means of points {alignment.FIVE_POINTS} to Deep3DFaceRecon's standard face by "
            f"least squares, {alignment.DEEP3D_SCALE:g} pixels a unit; frame resized (bicubic, Pillow), "
            f"{SIZE} x {SIZE} cut out, black outside; RGB in [0, 1]; coefficients 80 to 143"
        ),
        input_shape=(SIZE, SIZE),
        prepare=functools.partial(
            alignment.prepare, crop=functools.partial(alignment.deep3d_crop, size=SIZE), size=SIZE
        ),
        load=functools.partial(face_regressor.load, name=NAME, heads=HEADS),
        apply=functools.partial(face_regressor.coefficients, columns=EXPRESSION),
    )
}
