"""Dense optical flow between two pictures of a face, and what is derived from it.

Two methods: Farneback's, which MicroAttNet (section 3.3) uses, by OpenCV or by our own JAX
(:mod:`mer_jax.clips.farneback`), and TV-L1, with which the field's MEGC2019 data was made, by OpenCV's contributed
modules.
"""

import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from mer_jax.errors import UserError
from mer_jax.parallel import available_processors

METHODS = ("farneback", "tvl1")
BACKENDS = ("opencv", "jax")
CHANNELS = ("u", "v", "m", "strain")
MIN_SIDE = 10  # px; OpenCV fades 5 px out from every side, which has no meaning on a narrower picture

_ACCELERATOR_PIXELS = 32 * 224 * 224  # of pairs computed at a time; takes about half a GiB


@dataclass(frozen=True)
class FlowConfig:
    """How flow is computed; the defaults of Farneback's method are the customary ones, those of TV-L1 are OpenCV's.

    Attributes:
        method: ``'farneback'`` (Farneback, SCIA 2003) or ``'tvl1'`` (Zach, Pock and Bischof, DAGM 2007).
        backend: ``'opencv'`` or ``'jax'``, which has Farneback's method only and gives the same flow to about 1e-6 px
            inside the picture.
        pyr_scale: Farneback: size of a pyramid level relative to the one below it, in (0, 1).
        levels: Farneback: levels above full size, at least 0. OpenCV, and so do we, leaves out those with a side
            below 32 px.
        winsize: Farneback: side of the window over which displacements are averaged, px, at least 2.
        iterations: Farneback: iterations per level, at least 1.
        poly_n: Farneback: half-width of the neighbourhood to which polynomials are fitted, px, at least 1.
        poly_sigma: Farneback: standard deviation of the weights of that fit, px; 0 stands for 0.3 ``poly_n``.
        gaussian_window: Farneback: average with a Gaussian of standard deviation 0.3 (winsize // 2) instead of a box.
        tau: TV-L1: time step, above 0.
        lambda_: TV-L1: weight of the data term, above 0; the smaller, the smoother.
        theta: TV-L1: tightness of the coupling between data term and smoothness, above 0.
        scales: TV-L1: number of pyramid scales, at least 1.
        scale_step: TV-L1: size of a scale relative to the one below it, in (0, 1).
        warps: TV-L1: warps per scale, at least 1.
        epsilon: TV-L1: change of flow below which iterations stop, above 0.
        inner_iterations: TV-L1: iterations between two outlier filters, at least 1.
        outer_iterations: TV-L1: number of such rounds, at least 1.
        gamma: TV-L1: weight of a term that models changes of light, at least 0.
        median_filtering: TV-L1: side of the median filter, px; 1 (off), 3 or 5.
    """

    method: str = "farneback"
    backend: str = "opencv"
    pyr_scale: float = 0.5
    levels: int = 3
    winsize: int = 15
    iterations: int = 3
    poly_n: int = 5
    poly_sigma: float = 1.2
    gaussian_window: bool = False
    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    epsilon: float = 0.01
    inner_iterations: int = 30
    outer_iterations: int = 10
    gamma: float = 0.0
    median_filtering: int = 5

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"flow method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.backend not in BACKENDS:
            raise UserError(f"flow backend {self.backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if self.method == "tvl1" and self.backend != "opencv":
            raise UserError(f"flow method 'tvl1' has no backend {self.backend!r}; take backend 'opencv'")
        for name, least in (
            ("levels", 0),
            ("winsize", 2),
            ("iterations", 1),
            ("poly_n", 1),
            ("scales", 1),
            ("warps", 1),
            ("inner_iterations", 1),
            ("outer_iterations", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"flow {name} {value!r}: must be a whole number of at least {least}")
        for name in ("poly_sigma", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"flow {name} {getattr(self, name)!r}: must be a number of at least 0")
        for name in ("tau", "lambda_", "theta", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"flow {name} {getattr(self, name)!r}: must be a positive number")
        for name in ("pyr_scale", "scale_step"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"flow {name} {getattr(self, name)!r}: must lie between 0 and 1, both excluded")
        if self.median_filtering not in (1, 3, 5):
            raise UserError(f"flow median_filtering {self.median_filtering!r}: must be 1 (off), 3 or 5")


def to_grey(frames: np.ndarray) -> np.ndarray:
    """Grey levels of RGB pictures (ITU-R BT.601 luma, as OpenCV rounds it).

    Args:
        frames: (..., H, W, 3) uint8 RGB.

    Returns:
        (..., H, W) uint8.

    Raises:
        UserError: The frames have another type or shape.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise UserError(f"frames of type {frames.dtype} and shape {frames.shape}: must be uint8 RGB, (..., H, W, 3)")
    if frames.size == 0:
        return np.zeros(frames.shape[:-1], np.uint8)
    # One tall picture: (..., H, W, 3) -> (..., W, 3), a colour is converted by itself.
    tall = np.ascontiguousarray(frames).reshape(-1, frames.shape[-2], 3)
    return cv2.cvtColor(tall, cv2.COLOR_RGB2GRAY).reshape(frames.shape[:-1])


def dense_flow(first: np.ndarray, second: np.ndarray, config: FlowConfig) -> np.ndarray:
    """Displacement of every pixel from one picture to another.

    What ``first`` shows at (x, y), ``second`` shows at (x, y) + flow[y, x]. Two identical pictures have zero flow
    exactly; by itself, Farneback's method would leave up to half a pixel along the right and the lower edge.

    A pair's flow depends on the pair alone, not on the others. Pairs are computed in parallel, in limited memory.

    Args:
        first: (..., H, W) uint8 or float32 grey levels from 0 to 255; leading axes broadcast against those of
            ``second``, e.g. one onset (H, W) and many frames (T, H, W).
        second: (..., H, W), of the same type.
        config: Method, backend and their settings.

    Returns:
        (..., H, W, 2) float32 px: u to the right, v downwards.

    Raises:
        UserError: The pictures are not of one type and size, or too small.
    """
    first, second = np.asarray(first), np.asarray(second)
    _check_pictures(first, second)
    leading = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    size = first.shape[-2:]
    first, second = np.broadcast_to(first, leading + size), np.broadcast_to(second, leading + size)
    flow = np.zeros((*leading, *size, 2), np.float32)
    moving = [index for index in np.ndindex(leading) if not np.array_equal(first[index], second[index])]
    if config.backend == "jax":
        _jax_pairs(first, second, moving, flow, config)
    else:
        _opencv_pairs(first, second, moving, flow, config)
    return flow


def flow_channels(flow: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Chosen channels of a flow field.

    ``'u'`` and ``'v'`` are the components (px), ``'m'`` is their length (px) and ``'strain'`` the
    :func:`optical_strain` (px per px).

    Args:
        flow: (..., H, W, 2) px.
        names: C of ``CHANNELS``, in the order wanted.

    Returns:
        (..., H, W, C) float32.

    Raises:
        UserError: A name is unknown, none is given, or ``flow`` is no flow field.
    """
    unknown = [name for name in names if name not in CHANNELS]
    if unknown or not names:
        raise UserError(f"flow channels {list(names)}: choose from {', '.join(CHANNELS)}")
    flow = _checked_field(flow)
    compute: dict[str, Callable[[], np.ndarray]] = {
        "u": lambda: flow[..., 0],
        "v": lambda: flow[..., 1],
        "m": lambda: np.hypot(flow[..., 0], flow[..., 1]),
        "strain": lambda: optical_strain(flow),
    }
    channels = np.empty((*flow.shape[:-1], len(names)), np.float32)
    for position, name in enumerate(names):
        channels[..., position] = compute[name]()
    return channels


def optical_strain(flow: np.ndarray) -> np.ndarray:
    """Magnitude of the optical strain, as Shreve et al. (FG 2011) define it and the field's MEGC2019 data holds it.

    The infinitesimal strain tensor of the displacement has the entries exx = du/dx, eyy = dv/dy and
    exy = eyx = (du/dy + dv/dx) / 2; its magnitude is sqrt(exx^2 + eyy^2 + exy^2 + eyx^2). Derivatives are central
    differences, one-sided in the outermost rows and columns (:func:`numpy.gradient`). A shift has none; a rotation has
    none to first order in the angle.

    Args:
        flow: (..., H, W, 2) px.

    Returns:
        (..., H, W) float32, px per px.

    Raises:
        UserError: ``flow`` is no flow field of at least 2 x 2 px.
    """
    flow = _checked_field(flow)
    if min(flow.shape[-3:-1]) < 2:
        raise UserError(f"a flow field of shape {flow.shape} has no strain; its sides must be at least 2 px")
    u_y, u_x = np.gradient(flow[..., 0], axis=(-2, -1))
    v_y, v_x = np.gradient(flow[..., 1], axis=(-2, -1))
    return np.sqrt(u_x**2 + v_y**2 + (u_y + v_x) ** 2 / 2)  # 2 exy^2


def resize_flow(flow: np.ndarray, size: int) -> np.ndarray:
    """Resizes a flow field to a square by the mean over the area that a new pixel covers.

    Displacements stay in px of the original grid: they say how far a face moved, whatever the size at which a model
    looks at it.

    Args:
        flow: (..., H, W, C) field; any channels.
        size: Side of the result in px, at least 1.

    Returns:
        (..., size, size, C) float32.

    Raises:
        UserError: ``size`` is below 1 or ``flow`` is no field.
    """
    flow = np.asarray(flow, np.float32)
    if size < 1:
        raise UserError(f"cannot resize a flow field to {size} px; ask for at least 1")
    if flow.ndim < 3 or 0 in flow.shape[-3:]:
        raise UserError(f"a flow field of shape {flow.shape}: must be (..., H, W, channels)")
    height, width, channels = flow.shape[-3:]
    leading = flow.shape[:-3]
    rows = _area_means(height, size) @ flow.reshape(*leading, height, width * channels)  # (..., size, W * C)
    # Columns last, so that one matrix product serves all rows and channels.
    rows = rows.reshape(*leading, size, width, channels).swapaxes(-1, -2).reshape(*leading, size * channels, width)
    means = rows @ _area_means(width, size).T  # (..., size * C, size)
    return np.ascontiguousarray(means.reshape(*leading, size, channels, size).swapaxes(-1, -2))


def _check_pictures(first: np.ndarray, second: np.ndarray) -> None:
    for name, pictures in (("first", first), ("second", second)):
        if pictures.ndim < 2:
            raise UserError(f"flow: the {name} picture has shape {pictures.shape}; it must be grey, (..., H, W)")
        if pictures.dtype not in (np.uint8, np.float32):
            raise UserError(
                f"flow: the {name} picture has type {pictures.dtype}; give grey levels 0 to 255 as uint8 or float32"
            )
    if first.dtype != second.dtype:
        raise UserError(f"flow: the first picture is {first.dtype}, the second {second.dtype}; give both in one type")
    if first.shape[-2:] != second.shape[-2:]:
        (height, width), (other_height, other_width) = first.shape[-2:], second.shape[-2:]
        raise UserError(
            f"flow: the first picture is {width} x {height} px, the second {other_width} x {other_height}; "
            "give both in one size"
        )
    if min(first.shape[-2:]) < MIN_SIDE:
        raise UserError(
            f"flow: pictures of {first.shape[-1]} x {first.shape[-2]} px are too small; each side must be at least "
            f"{MIN_SIDE} px"
        )
    try:
        np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    except ValueError as error:
        raise UserError(
            f"flow: {first.shape[:-2]} first and {second.shape[:-2]} second pictures do not broadcast; give as many of "
            "one as of the other"
        ) from error
    for name, pictures in (("first", first), ("second", second)):
        if pictures.dtype == np.float32 and not np.isfinite(pictures).all():
            raise UserError(
                f"flow: the {name} picture holds values that are not finite; give grey levels from 0 to 255"
            )


def _checked_field(flow: np.ndarray) -> np.ndarray:
    flow = np.asarray(flow, np.float32)
    if flow.ndim < 3 or flow.shape[-1] != 2:
        raise UserError(f"a flow field of shape {flow.shape}: must be (..., H, W, 2)")
    return flow


def _opencv_pairs(first, second, moving: list[tuple[int, ...]], flow: np.ndarray, config: FlowConfig) -> None:
    """Fills the fields of the pairs ``moving``."""
    one_pair = _opencv_tvl1 if config.method == "tvl1" else _opencv_farneback

    def fill(index):
        flow[index] = one_pair(np.ascontiguousarray(first[index]), np.ascontiguousarray(second[index]), config)

    _in_threads(fill, moving)


def _jax_pairs(first, second, moving: list[tuple[int, ...]], flow: np.ndarray, config: FlowConfig) -> None:
    """Fills the fields of the pairs ``moving``, always as many at a time, so that one program serves all."""
    # Here, because JAX takes a second to import and OpenCV's users need none of it.
    import jax

    from mer_jax.clips.farneback import farneback_flow

    # A CPU is fastest when a pair stays in its cache; an accelerator needs many to be busy.
    on_cpu = jax.default_backend() == "cpu"
    at_a_time = 1 if on_cpu else max(1, _ACCELERATOR_PIXELS // math.prod(first.shape[-2:]))

    def fill(chunk):
        padded = chunk + chunk[-1:] * (at_a_time - len(chunk))
        pairs = [np.stack([pictures[index] for index in padded]).astype(np.float32) for pictures in (first, second)]
        for index, field in zip(chunk, np.asarray(farneback_flow(*pairs, config)), strict=False):
            flow[index] = field

    chunks = [moving[start : start + at_a_time] for start in range(0, len(moving), at_a_time)]
    for chunk in chunks[:1] if on_cpu else chunks:  # the first one alone: it may have to compile
        fill(chunk)
    _in_threads(fill, chunks[1:] if on_cpu else [])


def _in_threads(function: Callable, items: list) -> None:
    """Calls a function, which lets other threads run meanwhile, with every item."""
    # Worker processes share out the processors among themselves already.
    alone = multiprocessing.parent_process() is None
    workers = min(available_processors(), len(items)) if alone else 1
    if workers <= 1:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _done in pool.map(function, items):
            pass


def _opencv_farneback(first: np.ndarray, second: np.ndarray, config: FlowConfig) -> np.ndarray:
    return cv2.calcOpticalFlowFarneback(
        first,
        second,
        None,
        pyr_scale=config.pyr_scale,
        levels=config.levels,
        winsize=config.winsize,
        iterations=config.iterations,
        poly_n=config.poly_n,
        poly_sigma=config.poly_sigma,
        flags=cv2.OPTFLOW_FARNEBACK_GAUSSIAN if config.gaussian_window else 0,
    )


def _opencv_tvl1(first: np.ndarray, second: np.ndarray, config: FlowConfig) -> np.ndarray:
    if first.dtype == np.float32:
        # OpenCV takes uint8 from 0 to 255, but floating-point pictures from 0 to 1.
        first, second = first / np.float32(255), second / np.float32(255)
    # An instance holds its own buffers, so that every thread needs one.
    method = cv2.optflow.DualTVL1OpticalFlow.create(
        tau=config.tau,
        lambda_=config.lambda_,
        theta=config.theta,
        nscales=config.scales,
        warps=config.warps,
        epsilon=config.epsilon,
        innnerIterations=config.inner_iterations,
        outerIterations=config.outer_iterations,
        scaleStep=config.scale_step,
        gamma=config.gamma,
        medianFiltering=config.median_filtering,
    )
    return method.calc(first, second, None)


def _area_means(length: int, size: int) -> np.ndarray:
    """(size, length) float32: in row i the weights of ``length`` pixels in the mean over the i-th of ``size`` parts."""
    edges = np.arange(size + 1) * (length / size)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * (size / length)).astype(np.float32)
