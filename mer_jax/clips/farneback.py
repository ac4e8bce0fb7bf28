"""Farneback's dense optical flow in JAX: batched, jitted, differentiable, and numerically OpenCV's.

G. Farneback, Two-Frame Motion Estimation Based on Polynomial Expansion, SCIA 2003. Each picture is fitted, around every
pixel, by a quadratic polynomial (section 3 of the paper); a shift of the picture changes its linear coefficients in
proportion to the quadratic ones, so that two fits give the shift, averaged over a window for robustness (section 4.2),
iterated, and run from coarse to fine. The paper leaves much open: pyramid, borders, constants. Those are OpenCV's
(``modules/video/src/optflowgf.cpp``), including what happens where a shift points outside the picture.

Agreement with OpenCV is that of rounding, except near the border: a pixel of the outermost rows and columns counts as
leaving the picture or not by the sign of shifts of 1e-8 px, so that there rounding alone moves OpenCV's own flow by up
to a tenth of a pixel.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.clips.flow import FlowConfig

_MIN_LEVEL_SIDE = 32  # px; a pyramid level with a smaller side is left out
_FADE = (0.14, 0.14, 0.4472, 0.4472, 0.4472)  # weight of the outermost rows and columns, from the edge inwards
_REGULARISER = 1e-3  # added to the determinant, so that a constant picture has zero flow


@partial(jax.jit, static_argnames="config")
def farneback_flow(first: jax.Array, second: jax.Array, config: FlowConfig) -> jax.Array:
    """Displacement of every pixel from one picture to another.

    Differentiable in both pictures wherever the flow is: not where a shift meets a whole pixel, as bilinear
    interpolation has it. Gradients are finite everywhere.

    Args:
        first: (..., H, W) float32 or float64 grey levels from 0 to 255, sides of at least 10 px.
        second: (..., H, W), likewise, of the same shape.
        config: Parameters; its method must be ``'farneback'``, its backend plays no role.

    Returns:
        (..., H, W, 2) px of the pictures' type: u to the right, v downwards. What ``first`` shows at (x, y), ``second``
        shows at (x, y) + flow[y, x].

    Raises:
        ValueError: Another method, shapes that differ, or pictures that are not floating-point.
    """
    if config.method != "farneback":
        raise ValueError(f"farneback_flow cannot compute flow by method {config.method!r}")
    if first.shape != second.shape or first.dtype != second.dtype or not jnp.issubdtype(first.dtype, jnp.floating):
        raise ValueError(f"pictures {first.shape} {first.dtype} and {second.shape} {second.dtype} are no float pairs")
    *leading, height, width = first.shape
    # Polynomials are fitted to differences; without the common level they keep more digits, and constant pictures are
    # exactly zero. (2, B, H, W)
    pictures = jnp.stack([picture.reshape(-1, height, width) for picture in (first, second)])
    pictures = pictures - jax.lax.stop_gradient(pictures[:, :, :1, :1])
    flow = None
    for scale in reversed(_level_scales(height, width, config)):
        level_height, level_width = round(height * scale), round(width * scale)
        if flow is None:
            flow = jnp.zeros((2, pictures.shape[1], level_height, level_width), first.dtype)
        else:
            flow = _upsampled(flow, level_height, level_width) * (1 / config.pyr_scale)
        # (2, B, H, W) -> (5, 2, B, h, w)
        coefficients = _polynomials(_level(pictures, scale), config.poly_n, config.poly_sigma)
        flow = _refined(flow, coefficients[:, 0], coefficients[:, 1], config)
    return jnp.moveaxis(flow, 0, -1).reshape(*leading, height, width, 2)


def _level_scales(height: int, width: int, config: FlowConfig) -> list[float]:
    """Sizes of the pyramid levels relative to the picture, from 1 downwards."""
    scales = [1.0]
    while len(scales) <= config.levels and min(height, width) * scales[-1] * config.pyr_scale >= _MIN_LEVEL_SIDE:
        scales.append(scales[-1] * config.pyr_scale)
    return scales


def _level(pictures: jax.Array, scale: float) -> jax.Array:
    """(..., H, W) -> (..., h, w): the full-size picture blurred against aliasing, then sampled."""
    if scale == 1:
        taps = _blur_taps(scale)[None]
        (pictures,) = _filtered(pictures, -2, taps, mode="reflect")
        (pictures,) = _filtered(pictures, -1, taps, mode="reflect")
        return pictures
    # Few rows and columns remain, so that blur and sampling are cheapest as one matrix per axis.
    height, width = pictures.shape[-2:]
    return _along_both_axes(_blurred_samples(height, scale), _blurred_samples(width, scale), pictures)


def _upsampled(flow: jax.Array, height: int, width: int) -> jax.Array:
    """(..., h, w) -> (..., height, width), bilinear."""
    return _along_both_axes(_linear_samples(flow.shape[-2], height), _linear_samples(flow.shape[-1], width), flow)


def _polynomials(pictures: jax.Array, poly_n: int, poly_sigma: float) -> jax.Array:
    """Coefficients of the polynomial around every pixel.

    Args:
        pictures: (..., h, w).
        poly_n: Half-width of the neighbourhood.
        poly_sigma: Standard deviation of its weights.

    Returns:
        (5, ..., h, w): coefficients of y, x, y^2, x^2 and x y.
    """
    offsets = np.arange(-poly_n, poly_n + 1)
    plain, inverse = _fit_weights(poly_n, poly_sigma)
    slope = offsets * plain
    # The moment of x^2, less what the constant coefficient explains of it.
    bend = inverse[0, 3] * plain + inverse[3, 3] * offsets**2 * plain
    plain_rows, slope_rows, bend_rows = _filtered(pictures, -2, np.stack([plain, slope, bend]))
    x, x_x = _filtered(plain_rows, -1, np.stack([inverse[1, 1] * slope, bend]))
    y, x_y = _filtered(slope_rows, -1, np.stack([inverse[1, 1] * plain, inverse[5, 5] * slope]))
    (y_y,) = _filtered(bend_rows, -1, plain[None])
    return jnp.stack([y, x, y_y, x_x, x_y])


def _refined(flow: jax.Array, first: jax.Array, second: jax.Array, config: FlowConfig) -> jax.Array:
    """All iterations of one level.

    Args:
        flow: (2, B, h, w) px, where to start.
        first: (5, B, h, w) coefficients of the first picture.
        second: (5, B, h, w) coefficients of the second picture.
        config: Number of iterations and window.

    Returns:
        (2, B, h, w) px.
    """
    half = config.winsize // 2
    if config.gaussian_window:
        taps, share = _gaussian(half, 0.3 * half), 1.0
    else:
        # OpenCV sums an odd number of pixels also where winsize is even.
        taps, share = np.ones(2 * half + 1), 1 / config.winsize**2
    second = jnp.moveaxis(second, 0, -1)  # (B, h, w, 5): what is looked up together lies together

    def iteration(flow, _):
        equations = _equations(flow, first, second)  # (5, B, h, w)
        for axis in (-2, -1):
            (equations,) = _filtered(equations, axis, taps[None])
        g11, g12, g22, h1, h2 = equations * share
        determinant = g11 * g22 - g12 * g12 + _REGULARISER
        return jnp.stack([(g11 * h2 - g12 * h1) / determinant, (g22 * h1 - g12 * h2) / determinant]), None

    # A loop compiles in half the time of its unrolled form and runs as fast; no convolution suffers from it here.
    return jax.lax.scan(iteration, flow, None, length=config.iterations)[0]


def _equations(flow: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """The normal equations G d = h of every pixel (sections 4.1 and 4.4 of the paper), before averaging.

    Args:
        flow: (2, B, h, w) px, the displacement so far.
        first: (5, B, h, w) coefficients of the first picture.
        second: (B, h, w, 5) coefficients of the second picture.

    Returns:
        (5, B, h, w): G11, G12, G22, h1, h2, where index 1 belongs to y.
    """
    height, width = flow.shape[-2:]
    dx, dy = flow
    there, inside = _looked_up(second, dx, dy)
    # Where a displacement leaves the picture, the first picture's coefficients stand for both.
    y_y, x_x, x_y = (jnp.where(inside, (first[i] + there[i]) / 2, first[i]) for i in (2, 3, 4))
    x_y = x_y / 2  # the polynomial's mixed term is twice the matrix's entry
    b_y, b_x = ((first[i] - jnp.where(inside, there[i], 0)) / 2 for i in (0, 1))
    b_y = b_y + y_y * dy + x_y * dx
    b_x = b_x + x_y * dy + x_x * dx
    fade = jnp.asarray(np.outer(_fade(height), _fade(width)), flow.dtype)[None]
    y_y, x_x, x_y, b_y, b_x = (value * fade for value in (y_y, x_x, x_y, b_y, b_x))
    return jnp.stack(
        [y_y**2 + x_y**2, (y_y + x_x) * x_y, x_x**2 + x_y**2, y_y * b_y + x_y * b_x, x_y * b_y + x_x * b_x]
    )


def _looked_up(coefficients: jax.Array, dx: jax.Array, dy: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Bilinear samples of (B, h, w, 5) coefficients at (x + dx, y + dy).

    Returns:
        Five samples (B, h, w), and whether all four neighbours are inside the picture, (B, h, w); the samples are
        meaningless where they are not.
    """
    batch, height, width, channels = coefficients.shape
    x = jnp.arange(width, dtype=dx.dtype)[None, None, :] + dx
    y = jnp.arange(height, dtype=dy.dtype)[None, :, None] + dy
    left, top = jnp.floor(x), jnp.floor(y)
    inside = (left >= 0) & (left < width - 1) & (top >= 0) & (top < height - 1)
    # Clipped as floats: how a float beyond the integers converts is left open.
    columns = jnp.clip(left, 0, width - 2).astype(jnp.int32)
    rows = jnp.clip(top, 0, height - 2).astype(jnp.int32)
    places = (rows * width + columns).reshape(batch, -1, 1)
    table = coefficients.reshape(batch, height * width, channels)

    def corner(step):
        # (B, h * w, 5); a place is inside by construction
        return jnp.take_along_axis(table, places + step, axis=1, mode="promise_in_bounds")

    fx, fy = ((x - left).reshape(batch, -1, 1), (y - top).reshape(batch, -1, 1))
    samples = (
        (1 - fx) * (1 - fy) * corner(0)
        + fx * (1 - fy) * corner(1)
        + (1 - fx) * fy * corner(width)
        + fx * fy * corner(width + 1)
    ).reshape(batch, height, width, channels)
    return [samples[..., channel] for channel in range(channels)], inside


def _filtered(values: jax.Array, axis: int, taps: np.ndarray, mode: str = "edge") -> list[jax.Array]:
    """Correlates an axis with each of K filters.

    Sums of shifted slices: XLA turns them into one vectorised loop, while its convolutions with a single channel take
    twenty times as long on a CPU.

    Args:
        values: Any array.
        axis: Which axis.
        taps: (K, 2 n + 1) filters.
        mode: How the axis goes on beyond its ends, as in :func:`numpy.pad`.

    Returns:
        K arrays of the shape of ``values``.
    """
    axis, length, half = axis % values.ndim, values.shape[axis], taps.shape[1] // 2
    margins = [(half, half) if position == axis else (0, 0) for position in range(values.ndim)]
    # Without the barriers XLA would compute the values again for every tap.
    padded = jax.lax.optimization_barrier(jnp.pad(values, margins, mode=mode))
    slices = [jax.lax.slice_in_dim(padded, start, start + length, axis=axis) for start in range(2 * half + 1)]
    filtered = [sum(float(tap) * part for tap, part in zip(row, slices, strict=True)) for row in taps]
    return jax.lax.optimization_barrier(filtered)


def _along_both_axes(rows: np.ndarray, columns: np.ndarray, values: jax.Array) -> jax.Array:
    """(h, H), (w, W) and (..., H, W) -> (..., h, w)."""
    rows, columns = jnp.asarray(rows, values.dtype), jnp.asarray(columns, values.dtype)
    values = jnp.einsum("hH,...HW->...hW", rows, values, precision="highest")
    return jnp.einsum("wW,...hW->...hw", columns, values, precision="highest")


def _gaussian(half: int, sigma: float) -> np.ndarray:
    """(2 half + 1,) weights that sum to 1."""
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def _blur_taps(scale: float) -> np.ndarray:
    """(2 n + 1,) weights of the blur that OpenCV applies before it samples at ``scale``."""
    sigma = (1 / scale - 1) / 2
    size = max(round(5 * sigma) | 1, 3)
    # OpenCV's kernel of size 3 for a sigma of zero.
    return _gaussian(size // 2, sigma) if sigma > 0 else np.array([0.25, 0.5, 0.25])


def _blurred_samples(length: int, scale: float) -> np.ndarray:
    """(round(length * scale), length) matrix that blurs an axis and samples it."""
    taps = _blur_taps(scale)
    half = len(taps) // 2
    reflected = np.pad(np.arange(length), half, mode="reflect")
    blur = np.zeros((length, length))
    for offset, tap in enumerate(taps):
        np.add.at(blur, (np.arange(length), reflected[offset : offset + length]), tap)
    return _linear_samples(length, round(length * scale)) @ blur


def _linear_samples(length: int, size: int) -> np.ndarray:
    """(size, length) matrix that samples an axis at ``size`` places linearly, the ends held (OpenCV's INTER_LINEAR)."""
    # OpenCV keeps places as float32, which shows at places of some hundreds.
    places = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
    places = np.clip(places, 0, length - 1)
    left = np.minimum(np.floor(places).astype(int), length - 2)
    share = places - left
    matrix = np.zeros((size, length))
    matrix[np.arange(size), left] = 1 - share
    matrix[np.arange(size), left + 1] = share
    return matrix


def _fit_weights(poly_n: int, poly_sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the polynomial fit along one axis, (2 n + 1,), and the inverse of its matrix of moments, (6, 6).

    The basis is 1, x, y, x^2, y^2, x y.
    """
    offsets = np.arange(-poly_n, poly_n + 1)
    weights = _gaussian(poly_n, poly_sigma if poly_sigma > np.finfo(np.float32).eps else 0.3 * poly_n)
    x, y = (grid.ravel() for grid in np.meshgrid(offsets, offsets))
    basis = np.stack([np.ones_like(x), x, y, x**2, y**2, x * y])  # (6, (2 n + 1)^2)
    moments = (basis * np.outer(weights, weights).ravel()) @ basis.T
    return weights, np.linalg.inv(moments)


def _fade(length: int) -> np.ndarray:
    """(length,) weights of rows or columns, falling towards both ends."""
    weights = np.ones(length)
    weights[: len(_FADE)] *= _FADE
    weights[-len(_FADE) :] *= _FADE[::-1]
    return weights
