"""The TFDS side of the data set: what a record holds, and how records are written without TensorFlow."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mer_jax.clips.layouts import LABELS

VERSION = "1.0.0"

_DESCRIPTION = """\
Micro-expression clips as per-frame features: one record per clip and view, with the features of all its
frames from each extractor. Labels are {labels} in this order, several may be 1, and -1 stands for a label
that is not known.
"""

_CITATION = """\
@article{li2022fourdme,
  title = {4DME: A Spontaneous 4D Micro-Expression Dataset With Multimodalities},
  author = {Li, Xiaobai and Cheng, Shiyang and Li, Yante and Behzad, Muzammil and Shen, Jie and Zafeiriou,
  Stefanos
            and Pantic, Maja and Zhao, Guoying},
  journal = {IEEE Transactions on Affective Computing},
  volume = {14}, pages = {3031--3047}, doi = {10.1109/TAFFC.2022.3182342}
}
"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes records that were prepared elsewhere (:func:`data_builders.four_dme.build` makes one).

    Args:
        records: Split name to a function that yields its records in order; no split may be empty.
        dims: Extractor name to D.
        facts: What the data set says about itself, JSON-able; becomes the TFDS metadata.
        **kwargs: Handed to TFDS: ``config`` and ``data_dir``.
    """

    name = "four_dme"
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS wants a list)
        tfds.core.BuilderConfig(name="demo", description="Rendered demo clips; results on them are no benchmark"),
        tfds.core.BuilderConfig(name="challenge", description="The 4DMR challenge: two-view texture frames"),
        tfds.core.BuilderConfig(name="release", description="The 4DME release: single-view grey frames"),
    ]

    def __init__(
        self,
        *,
        records: Mapping[str, Callable[[], Iterable[dict[str, Any]]]],
        dims: Mapping[str, int],
        facts: Mapping[str, Any],
        **kwargs,
    ):
        self._records, self._dims, self._facts = records, dims, facts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION.format(labels=", ".join(LABELS)),
            citation=_CITATION,
            # Records are read back in the order in which they were written, not in that of their hashes.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._facts),
            features=tfds.features.FeaturesDict(
                {
                    "clip": tfds.features.Text(doc="Name of the clip."),
                    "id": tfds.features.Scalar(np.int64, doc="The clip's number in submissions."),
                    "subject": tfds.features.Text(doc="Whose face it is; empty if unknown."),
                    "view": tfds.features.Text(doc="l (left) or r (right), c for clips of a single view."),
                    "labels": tfds.features.Tensor(
                        shape=(len(LABELS),),
                        dtype=np.int8,
                        doc=f"0 or 1 for {', '.join(LABELS)}; -1 unknown.",
                    ),
                    "num_frames": tfds.features.Scalar(np.int32, doc="T."),
                    "box": tfds.features.Tensor(
                        shape=(4,), dtype=np.int32, doc="Face crop in the view: left, top, width, height."
                    ),
                    "face_found": tfds.features.Scalar(np.bool_, doc="False where the box is the fallback."),
                    "onset": tfds.features.Scalar(np.int32, doc="Frame index; -1 unknown."),
                    "apex": tfds.features.Scalar(np.int32, doc="Frame index; -1 unknown."),
                    "offset": tfds.features.Scalar(np.int32, doc="Frame index, inclusive; -1 unknown."),
                    "features": {
                        # As bytes: TFDS packs and unpacks lists of floats one by one.
                        name: tfds.features.Tensor(shape=(None, dim), dtype=np.float32, encoding="bytes", doc="(T, D)")
                        for name, dim in self._dims.items()
                    },
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(records) for split, records in self._records.items()}

    def _generate_examples(self, records):
        yield from enumerate(records())
