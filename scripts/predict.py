"""Predicts clips of its data set, or a video of your own, with a trained study.

python scripts/predict.py --workdir runs/fusion --split test --submission out.csv
python scripts/predict.py --workdir runs/fusion --clip clip_003 --picture clip_003.png
python scripts/predict.py --workdir runs/micro_attnet --video face.mp4 --picture face.png
"""

import argparse
import sys
from pathlib import Path

# Works from a clone, without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mer_jax.cli import open_door


def main() -> None:
    """Flags to one function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run folder, as scripts/train.py wrote it")
    parser.add_argument("--member", help="one member, such as fold0-seed3; the ensemble of all by default")
    clips = parser.add_argument_group("clips of the data set")
    clips.add_argument("--split", choices=("test", "train"), help="test (the default), or train: out of fold")
    clips.add_argument("--submission", help="CSV to write: Id,Negative,Positive,Repression,Surprise,Others")
    clips.add_argument("--clip", help="a training clip, or its view such as clip_003_r, to draw out of fold: --picture")
    video = parser.add_argument_group("a video of your own")
    video.add_argument("--video", help="a video file with one face, of any length")
    video.add_argument("--onset", help="first frame of the expression: a number (from 0) or a time, such as 0.4s")
    video.add_argument("--offset", help="its last frame; without either, the half second of most motion is taken")
    picture = parser.add_argument_group("a picture of the video, or of the one clip")
    picture.add_argument(
        "--picture", help="PNG to write: frames, flow and motion, or what was attended to, and the rest"
    )
    flags = parser.parse_args()
    open_door(_predict, flags)


def _predict(flags: argparse.Namespace) -> None:
    from mer_jax.errors import UserError

    of_clips, of_video = ("split", "submission", "clip"), ("onset", "offset")
    astray = [name for name in (of_clips if flags.video else of_video) if getattr(flags, name) is not None]
    if astray:
        raise UserError(f"--{astray[0]} {'does not go with' if flags.video else 'needs'} --video")
    if flags.picture and not (flags.video or flags.clip):
        raise UserError("--picture needs --video or --clip")
    if flags.clip:
        if flags.split or flags.submission or not flags.picture:
            raise UserError("--clip goes with --picture and --member alone: say with --picture what to write")
        from mer_jax.report.clip_pictures import picture_of_clip

        picture_of_clip(flags.workdir, flags.clip, flags.picture, member=flags.member)
        print(f"picture: {flags.picture}")
    elif flags.video:
        from mer_jax.study.video import predict_video

        predict_video(
            flags.workdir,
            flags.video,
            onset=flags.onset,
            offset=flags.offset,
            member=flags.member,
            picture=flags.picture,
        )
    else:
        from mer_jax.study.predict import predict_run

        predict_run(flags.workdir, split=flags.split or "test", member=flags.member, submission=flags.submission)


if __name__ == "__main__":
    main()
