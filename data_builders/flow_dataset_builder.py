"""The TFDS side of data sets of flow: what a record holds, and how records are written without TensorFlow."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_builders.flow_records import VERSION, FlowFormat


class FlowBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes records that were prepared elsewhere; :func:`flow_builder` gives it a name.

    Args:
        records: Split name to a function that yields its records in order; no split may be empty.
        flow_format: What the records hold.
        facts: What the data set says about itself, JSON-able; becomes the TFDS metadata.
        description: What the data are, for people.
        citation: BibTeX.
        **kwargs: Handed to TFDS: ``config`` and ``data_dir``.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        *,
        records: Mapping[str, Callable[[], Iterable[dict[str, Any]]]],
        flow_format: FlowFormat,
        facts: Mapping[str, Any],
        description: str,
        citation: str,
        **kwargs,
    ):
        self._records, self._format, self._facts = records, flow_format, facts
        self._texts = {"description": description, "citation": citation}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        told = self._format
        labels = f"0 or 1 for {', '.join(told.label_names)}; -1 unknown."
        index = "Frame index; -1 unknown."
        return tfds.core.DatasetInfo(
            builder=self,
            **self._texts,
            # Records are read back in the order in which they were written, not in that of their hashes.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._facts),
            features=tfds.features.FeaturesDict(
                {
                    "clip": tfds.features.Text(doc="Name of the clip."),
                    "id": tfds.features.Scalar(np.int64, doc="The clip's number in submissions."),
                    "subject": tfds.features.Text(doc="Whose face it is; empty if unknown."),
                    "database": tfds.features.Text(doc="Where the clip is from; empty if there is one only."),
                    "view": tfds.features.Text(doc="l (left) or r (right), c for clips of a single view."),
                    "labels": tfds.features.Tensor(shape=(len(told.label_names),), dtype=np.int8, doc=labels),
                    "num_frames": tfds.features.Scalar(np.int32, doc="T; -1 unknown."),
                    "box": tfds.features.Tensor(
                        shape=(4,), dtype=np.int32, doc="Face crop in the view: left, top, width, height; -1 unknown."
                    ),
                    "face_found": tfds.features.Scalar(np.bool_, doc="False where the box is the fallback."),
                    "onset": tfds.features.Scalar(np.int32, doc=index),
                    "apex": tfds.features.Scalar(np.int32, doc=index),
                    "offset": tfds.features.Scalar(np.int32, doc=f"{index[:-1]}, inclusive."),
                    "apex_annotated": tfds.features.Scalar(np.bool_, doc="False where the apex was found here."),
                    "flow": {
                        phase: tfds.features.Tensor(
                            shape=told.shape,
                            dtype=np.dtype(told.dtype),
                            # Flow in floats is noise in its last bits, which nothing compresses.
                            encoding="zlib" if told.dtype == "uint8" else "bytes",
                            doc=f"(H, W, C), C: {', '.join(told.channels)}.",
                        )
                        for phase in told.phases
                    },
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(records) for split, records in self._records.items()}

    def _generate_examples(self, records):
        yield from enumerate(records())


def flow_builder(family: str, config: str, **kwargs) -> FlowBuilder:
    """A builder called ``family`` with the one configuration ``config``; ``kwargs`` as of :class:`FlowBuilder`."""

    class Builder(FlowBuilder, skip_registration=True):
        name = family
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012 (TFDS wants a list)

    return Builder(config=config, **kwargs)
