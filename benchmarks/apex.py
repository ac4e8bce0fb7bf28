"""How well the apex is found on the demo clips, whose true apex is known.

    python benchmarks/apex.py

Finds the apex of every clip and view with each of the remedies of ``mer_jax.clips.apex`` on and off, and prints how
many frames it is off. The first row is the paper's plain rule, the last one the default.
"""

import argparse
import itertools
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Works from a clone, without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data_builders.four_dme.preparation import face_boxes, split_frame, views_of
from mer_jax.cli import open_door
from mer_jax.clips.apex import ApexConfig, find_apex, flow_intensity
from mer_jax.clips.crops import CropConfig, crop_clip
from mer_jax.clips.demo import load_ground_truth, make_demo_clips
from mer_jax.clips.flow import FlowConfig, dense_flow, to_grey
from mer_jax.clips.frames import read_frames
from mer_jax.clips.layouts import Clip, read_challenge
from mer_jax.errors import UserError
from mer_jax.parallel import run_tasks

DEFAULT = ApexConfig()
# (compensate, blink) and the smoothing.
RULES = tuple(itertools.product(("none", DEFAULT.compensate), (0, DEFAULT.blink)))
SMOOTHINGS = (0.0, DEFAULT.smooth)


@dataclass(frozen=True)
class Task:
    """A clip and how its faces are cut out."""

    clip: Clip
    crop: CropConfig


def intensities(task: Task) -> dict[str, list[np.ndarray]]:
    """View to the motion in its T frames, (T,), by each of ``RULES``."""
    boxes = face_boxes(task.clip, task.crop)
    grey: dict[str, list[np.ndarray]] = {view: [] for view in views_of(task.clip)}
    for frame in read_frames(task.clip.frames):
        for view, image in split_frame(frame, task.clip.two_view).items():
            grey[view].append(to_grey(crop_clip([image], boxes[view], task.crop.size)[0]))
    found = {}
    for view, frames in grey.items():
        fields = dense_flow(frames[0], np.stack(frames), FlowConfig())
        found[view] = [flow_intensity([fields], *rule) for rule in RULES]
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clips", default="data/clips/four_dme_demo", help="where the demo clips are, or are made")
    parser.add_argument("--seed", type=int, default=0, help="of the demo clips (default: %(default)s)")
    parser.add_argument("--num", nargs=2, type=int, default=(100, 28), metavar=("TRAIN", "TEST"), help="of demo clips")
    parser.add_argument("--scale", type=float, default=1.5, help="of the face crop (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per processor)")
    given = parser.parse_args()

    clips = read_challenge(
        make_demo_clips(
            given.clips, num_train=given.num[0], num_test=given.num[1], seed=given.seed, workers=given.workers
        )
    )
    crop = CropConfig(rule="largest", scale=given.scale, size=224)
    began = time.perf_counter()
    results = run_tasks(
        intensities, [Task(clip, crop) for clip in clips], workers=given.workers, desc="apex", unit="clip"
    )
    failed = next((result for result in results if isinstance(result, UserError)), None)
    if failed:
        raise failed
    truth = [load_ground_truth(given.clips, clip.name).apex for clip in clips]

    print(f"{len(clips)} clips of 2 views in {time.perf_counter() - began:.0f} s; crop {asdict(crop)}")
    print("| compensate | blink | smooth | view | median error | within 1 | within 3 | mean error |")
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for (number, (compensate, blink)), smooth in itertools.product(enumerate(RULES), SMOOTHINGS):
        for view in results[0]:
            found = [find_apex(result[view][number], smooth) for result in results]
            error = np.abs(np.subtract(found, truth))
            print(
                f"| {compensate} | {blink} | {smooth:g} | {view} | {np.median(error):.1f} | "
                f"{np.mean(error <= 1):.0%} | "
                f"{np.mean(error <= 3):.0%} | {error.mean():.2f} |"
            )


if __name__ == "__main__":
    open_door(main)
