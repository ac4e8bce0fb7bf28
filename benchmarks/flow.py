"""Measures the two backends of Farneback's flow against each other: speed, agreement, and truth.

    python benchmarks/flow.py
    python benchmarks/flow.py --clips DIR

Both backends are called as users call them, through ``mer_jax.clips.flow.dense_flow``, in turns within one process, so
that whatever else the machine does meets both. With ``--clips``, a folder of demo clips
(``mer_jax.clips.demo.make_demo_clips``), the end-point error against the renderer's true displacement, onset to apex,
is told as well.
"""

import argparse
import dataclasses
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import skimage.data

from mer_jax.cli import open_door
from mer_jax.clips import demo
from mer_jax.clips.flow import BACKENDS, FlowConfig, dense_flow, to_grey
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import read_challenge
from mer_jax.clips.views import split_views
from mer_jax.errors import UserError
from mer_jax.parallel import available_processors

MARGIN = 24  # px; what is nearer to the border counts as border
_FACE = (slice(60, 260), slice(70, 250))  # rows and columns of a demo view that show the face


def face_pairs(count: int, size: int = 224, displacement: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Photographs of a face under smooth random deformations, a pair for each of ``count`` seeds.

    Args:
        count: N.
        size: Side in px.
        displacement: Greatest displacement in px.

    Returns:
        Two (N, size, size) uint8 arrays.
    """
    face = cv2.resize(to_grey(skimage.data.astronaut()[0:250, 100:350]), (size, size), interpolation=cv2.INTER_AREA)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    warped = []
    for seed in range(2 * count):
        noise = np.random.default_rng(seed).normal(size=(size, size, 2)).astype(np.float32)
        field = cv2.GaussianBlur(noise, (0, 0), size / 10)
        field *= displacement / 2 / np.hypot(field[..., 0], field[..., 1]).max()
        places = columns + field[..., 0], rows + field[..., 1]
        warped.append(cv2.remap(face, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101))
    return np.stack(warped[:count]), np.stack(warped[count:])


def time_backends(first: np.ndarray, second: np.ndarray, config: FlowConfig, repeats: int) -> dict[str, np.ndarray]:
    """Seconds that each backend takes for all pairs.

    Args:
        first: (N, H, W) pictures.
        second: (N, H, W) pictures.
        config: Settings; the backend is replaced.
        repeats: R, the number of turns.

    Returns:
        Backend to (R,) seconds, and ``'compilation'`` to (1,), the JAX backend's first call.
    """
    configs = {backend: dataclasses.replace(config, backend=backend) for backend in BACKENDS}
    seconds = {backend: np.zeros(repeats) for backend in BACKENDS}
    start = time.perf_counter()
    dense_flow(first[:1], second[:1], configs["jax"])
    seconds["compilation"] = np.array([time.perf_counter() - start])
    for turn in range(repeats):
        for backend, backend_config in configs.items():
            start = time.perf_counter()
            dense_flow(first, second, backend_config)
            seconds[backend][turn] = time.perf_counter() - start
    return seconds


def agreement(first: np.ndarray, second: np.ndarray, config: FlowConfig) -> dict[str, float]:
    """How far the JAX backend is from OpenCV, in px, as the greater of the two components' differences.

    Args:
        first: (N, H, W) pictures, sides above ``2 * MARGIN``.
        second: (N, H, W) pictures.
        config: Settings; the backend is replaced.

    Returns:
        Over all pixels the ``median`` and ``max``; over those at least ``MARGIN`` px inside ``interior_p99`` and
        ``interior_max``; and ``border_share``, the share of the other pixels that differ by more than 1e-3 px.
    """
    fields = [dense_flow(first, second, dataclasses.replace(config, backend=backend)) for backend in BACKENDS]
    difference = np.abs(fields[0] - fields[1]).max(axis=-1)
    border = np.ones(difference.shape[-2:], bool)
    border[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    return {
        "median": float(np.median(difference)),
        "max": float(difference.max()),
        "interior_p99": float(np.percentile(difference[:, ~border], 99)),
        "interior_max": float(difference[:, ~border].max()),
        "border_share": float((difference[:, border] > 1e-3).mean()),
    }


def end_point_errors(clips_dir: Path, configs: dict[str, FlowConfig], limit: int) -> dict[str, float]:
    """Mean end-point error in the face area of demo clips, onset to apex, both views.

    Args:
        clips_dir: Folder of demo clips.
        configs: What to measure, by name.
        limit: Number of clips, from the first one on.

    Returns:
        Name to px; under ``'displacement'`` the mean length of the true displacement.

    Raises:
        UserError: The folder holds no demo clips.
    """
    sums = dict.fromkeys(("displacement", *configs), 0.0)
    clips = read_challenge(clips_dir)[:limit]
    for clip in clips:
        apex = demo.load_ground_truth(clips_dir, clip.name).apex
        onset_views, apex_views = (split_views(read_frame(clip.frames[index])) for index in (0, apex))
        for view in demo.VIEWS:
            true = demo.displacement_field(clips_dir, clip.name, view, apex)
            first, second = to_grey(onset_views[view]), to_grey(apex_views[view])
            sums["displacement"] += _mean_length(true)
            for name, config in configs.items():
                sums[name] += _mean_length(dense_flow(first, second, config) - true)
    return {name: total / (len(clips) * len(demo.VIEWS)) for name, total in sums.items()}


def main(arguments: Sequence[str]) -> None:
    """Prints the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=32, help="pairs of pictures per repetition (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="their side in px (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="repetitions (default: %(default)s)")
    parser.add_argument("--clips", type=Path, help="folder of demo clips, for end-point errors")
    parser.add_argument("--limit", type=int, default=20, help="clips to measure them on (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("pairs", 1), ("size", 2 * MARGIN + 1), ("repeats", 1), ("limit", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")

    import jax

    config = FlowConfig()
    print(
        f"{platform.machine()}, {available_processors()} processors; OpenCV {cv2.__version__}, "
        f"JAX {jax.__version__} on {jax.devices()[0].device_kind}"
    )
    first, second = face_pairs(options.pairs, options.size)
    seconds = time_backends(first, second, config, options.repeats)
    print(f"{options.pairs} pairs of {options.size} x {options.size} px, {options.repeats} repetitions in turns")
    for backend in BACKENDS:
        print(f"  {backend:7} {_spread(seconds[backend])} s")
    print(f"  OpenCV's time over ours {_spread(seconds['opencv'] / seconds['jax'])}")
    print(f"  our first call, with compilation, {seconds['compilation'][0]:.1f} s")

    for name, window in (("box", False), ("Gaussian", True)):
        found = agreement(first, second, dataclasses.replace(config, gaussian_window=window))
        print(
            f"difference, {name} window: median {found['median']:.1e} px, interior p99 {found['interior_p99']:.1e} px "
            f"(max {found['interior_max']:.1e}), border {found['border_share']:.2%} above 1e-3 px "
            f"(max {found['max']:.1e})"
        )
    if options.clips is not None:
        configs = {
            "Farneback, OpenCV": config,
            "Farneback, JAX": dataclasses.replace(config, backend="jax"),
            "TV-L1, OpenCV": dataclasses.replace(config, method="tvl1"),
        }
        errors = end_point_errors(options.clips, configs, options.limit)
        print(f"true displacement in the face area, onset to apex: mean {errors.pop('displacement'):.3f} px")
        for name, error in errors.items():
            print(f"  end-point error of {name}: {error:.4f} px")
        ratio = errors["Farneback, JAX"] / errors["Farneback, OpenCV"]
        print(f"  JAX over OpenCV: {ratio:.6f}")


def _mean_length(field: np.ndarray) -> float:
    return float(np.hypot(field[..., 0], field[..., 1])[_FACE].mean())


def _spread(values: np.ndarray) -> str:
    return f"median {np.median(values):.3f} ({values.min():.3f} to {values.max():.3f})"


if __name__ == "__main__":
    open_door(main, sys.argv[1:])
