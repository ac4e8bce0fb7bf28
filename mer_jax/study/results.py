"""What a study leaves behind: every member's probabilities for every sample, in one ``predictions.npz``."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from mer_jax.errors import UserError
from mer_jax.files import atomic_savez, read_arrays
from mer_jax.study.data import MULTI_CLASS, MULTI_LABEL
from mer_jax.study.grid_rows import is_grid

FILENAME = "predictions.npz"
OK = "ok"
DIVERGED = "diverged"
TRAIN = "train"
TEST = "test"
UNKNOWN_LABEL = -1
NO_FOLD = -1
ONSET_APEX = "onset_apex"
APEX_OFFSET = "apex_offset"
PHASES = (ONSET_APEX, APEX_OFFSET)

_HYPER = "hyper_"
_ATTENTION = "attention_"

# Letters: C clips, N samples (one view and phase of a clip), M members, E evaluated epochs, V most held-out
# samples of a fold, G gate weights, S streams, L labels, T frames. The second entry is the kind that the stored
# array must be safely cast from.
_FIELDS = {
    "label_name": ("L", np.str_),
    "task": ("", np.str_),
    "clip_name": ("C", np.str_),
    "clip_id": ("C", np.int64),
    "clip_subject": ("C", np.str_),
    "clip_split": ("C", np.str_),
    "clip_database": ("C", np.str_),
    "clip_labels": ("CL", np.int8),
    "clip_fold": ("C", np.int32),
    "sample_clip": ("N", np.int32),
    "sample_view": ("N", np.str_),
    "sample_phase": ("N", np.str_),
    "member_id": ("M", np.str_),
    "member_fold": ("M", np.int32),
    "member_seed": ("M", np.int32),
    "member_status": ("M", np.str_),
    "member_stop_epoch": ("M", np.int32),
    "probabilities": ("MNL", np.float32),
    "inner": ("MN", np.bool_),
    "curve_epoch": ("E", np.int32),
    "curve_train_loss": ("ME", np.float32),
    "curve_inner_loss": ("ME", np.float32),
    "curve_heldout_loss": ("ME", np.float32),
    "curve_sample": ("MV", np.int32),
    "curve_probabilities": ("MEVL", np.float32),
    "gate": ("MG", np.float32),
    "gate_name": ("G", np.str_),
    "stream_name": ("S", np.str_),
}


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """All predictions of a study, members along the first axis.

    C clips, N samples (one view and phase of a clip), M members (fold, seed, hyper-parameters), E evaluated
    epochs (0 where the weights come from elsewhere), V the largest number of held-out samples of a fold, G gate
    weights, S streams, T frames, L labels.

    Attributes:
        label_name: ``(L,)`` names of the labels or classes, unique.
        task: ``()`` ``'multi_label'`` or ``'multi_class'``.
        clip_name: ``(C,)`` names, unique.
        clip_id: ``(C,)`` integer ids of the data set.
        clip_subject: ``(C,)`` subject ids, ``''`` where unknown.
        clip_split: ``(C,)`` ``'train'`` or ``'test'``.
        clip_database: ``(C,)`` the database that a clip is from, ``''`` where there is only one.
        clip_labels: ``(C, L)`` 0 or 1, -1 where unknown; in a multi-class study each row is one-hot, or unknown
            altogether.
        clip_fold: ``(C,)`` the fold that holds the clip out, -1 for the test split.
        sample_clip: ``(N,)`` the clip of each sample, an index into the clips.
        sample_view: ``(N,)`` view names.
        sample_phase: ``(N,)`` ``'onset_apex'``, ``'apex_offset'``, or ``''`` for the whole clip.
        member_id: ``(M,)`` stable names such as ``fold0-seed3``.
        member_fold: ``(M,)`` the fold that the member holds out.
        member_seed: ``(M,)`` seeds.
        member_status: ``(M,)`` ``'ok'`` or ``'diverged'``.
        member_stop_epoch: ``(M,)`` the epoch whose parameters were kept.
        probabilities: ``(M, N, L)`` in [0, 1] after training, for all samples; NaN for diverged members.
        inner: ``(M, N)`` samples that served early stopping and thresholds but not gradients; whole clips.
        curve_epoch: ``(E,)`` the evaluated epochs.
        curve_train_loss: ``(M, E)``, NaN where absent, as the next two.
        curve_inner_loss: ``(M, E)``.
        curve_heldout_loss: ``(M, E)``, for display only.
        curve_sample: ``(M, V)`` held-out samples, padded with -1.
        curve_probabilities: ``(M, E, V, L)`` held-out probabilities at every evaluated epoch, for the leaky
            figures only.
        gate: ``(M, G)`` gate weights; G = 0 when the model has no gate.
        gate_name: ``(G,)`` what each weight belongs to.
        stream_name: ``(S,)`` what each attention weight over streams belongs to; S = 0 when the model has none.
        hyper: name -> ``(M,)`` per-member hyper-parameters.
        attention: modality -> ``(M, V, T)`` attention over frames of the held-out samples (rows as
            ``curve_sample``); in a study with streams, ``streams1`` and on -> ``(M, V, S)`` attention over streams
            after each block.
    """

    label_name: np.ndarray
    task: np.ndarray
    clip_name: np.ndarray
    clip_id: np.ndarray
    clip_subject: np.ndarray
    clip_split: np.ndarray
    clip_database: np.ndarray
    clip_labels: np.ndarray
    clip_fold: np.ndarray
    sample_clip: np.ndarray
    sample_view: np.ndarray
    sample_phase: np.ndarray
    member_id: np.ndarray
    member_fold: np.ndarray
    member_seed: np.ndarray
    member_status: np.ndarray
    member_stop_epoch: np.ndarray
    probabilities: np.ndarray
    inner: np.ndarray
    curve_epoch: np.ndarray
    curve_train_loss: np.ndarray
    curve_inner_loss: np.ndarray
    curve_heldout_loss: np.ndarray
    curve_sample: np.ndarray
    curve_probabilities: np.ndarray
    gate: np.ndarray
    gate_name: np.ndarray
    stream_name: np.ndarray
    hyper: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    attention: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of labels or classes."""
        return tuple(self.label_name.tolist())

    @property
    def multi_class(self) -> bool:
        """Whether exactly one of the labels is present in a clip."""
        return str(self.task) == MULTI_CLASS

    @property
    def ok(self) -> np.ndarray:
        """``(M,)`` bool: the members that did not diverge."""
        return self.member_status == OK

    @property
    def scored(self) -> np.ndarray:
        """``(C,)`` bool: clips that some fold holds out and that have a label; never the test split."""
        known = (self.clip_labels != UNKNOWN_LABEL).any(axis=1)
        return (self.clip_split == TRAIN) & (self.clip_fold != NO_FOLD) & known

    def inner_clips(self) -> np.ndarray:
        """``(M, C)`` bool: the clips of each member's inner split."""
        clips = np.zeros((len(self.member_id), len(self.clip_name)), bool)
        member, sample = np.nonzero(self.inner)
        clips[member, self.sample_clip[sample]] = True
        return clips

    def save(self, path: str | os.PathLike) -> None:
        """Writes the results to ``path`` (``predictions.npz``) atomically, after :meth:`validate`.

        Raises:
            UserError: The results contradict themselves, or the file cannot be written.
        """
        self.validate(path)
        arrays = {name: getattr(self, name) for name in _FIELDS}
        arrays |= {_HYPER + name: values for name, values in self.hyper.items()}
        arrays |= {_ATTENTION + name: values for name, values in self.attention.items()}
        atomic_savez(path, **arrays)

    @classmethod
    def load(cls, workdir: str | os.PathLike) -> "StudyResults":
        """Reads the results of a run.

        Args:
            workdir: The run folder, or the ``predictions.npz`` in it.

        Raises:
            UserError: There are none, the file cannot be read, or its content contradicts itself.
        """
        path = Path(workdir)
        if path.suffix != ".npz":
            path = path / FILENAME
        if is_grid(path.parent) and not path.is_file():
            raise UserError(f"{path.parent} holds a grid of studies; name the folder of one of its rows")
        if not path.is_file():
            raise UserError(f"{path}: not found; train the study first (scripts/train.py --workdir={path.parent})")
        arrays = read_arrays(path, "delete it and run scripts/train.py again")
        missing = sorted(set(_FIELDS) - set(arrays))
        if missing:
            raise UserError(f"{path}: lacks {', '.join(missing)}; written by another version, train the study again")
        results = cls(
            **{name: arrays[name] for name in _FIELDS},
            hyper={n.removeprefix(_HYPER): a for n, a in arrays.items() if n.startswith(_HYPER)},
            attention={n.removeprefix(_ATTENTION): a for n, a in arrays.items() if n.startswith(_ATTENTION)},
        )
        results.validate(path)
        return results

    def validate(self, where: str | os.PathLike = FILENAME) -> None:
        """Checks shapes, types, ranges, and that no member's inner split touches what it must not see.

        Args:
            where: The file to name in messages.

        Raises:
            UserError: Names the field that is wrong.
        """
        sizes: dict[str, int] = {}
        for name, (dims, kind) in _FIELDS.items():
            _check_array(where, name, getattr(self, name), dims, kind, sizes)
        for name, values in self.hyper.items():
            _check_array(where, _HYPER + name, values, "M", np.float32, sizes)
        for name, values in self.attention.items():
            last = "S" if is_stream(name) else "T"
            _check_array(where, _ATTENTION + name, values, f"MV{last}", np.float32, {**sizes})

        def require(condition, field, what):
            if not condition:
                raise UserError(f"{where}: {field} {what}; the file is damaged, train the study again")

        num_clips, num_samples = sizes["C"], sizes["N"]
        require(str(self.task) in (MULTI_LABEL, MULTI_CLASS), "task", f"is not {MULTI_LABEL} or {MULTI_CLASS}")
        require(len(self.label_name) > 0, "label_name", "is empty")
        for field in ("label_name", "clip_name", "member_id"):
            require(len(set(getattr(self, field).tolist())) == len(getattr(self, field)), field, "has duplicates")
        require(np.isin(self.clip_split, (TRAIN, TEST)).all(), "clip_split", f"is not all {TRAIN} or {TEST}")
        require(np.isin(self.clip_labels, (UNKNOWN_LABEL, 0, 1)).all(), "clip_labels", "is not all -1, 0 or 1")
        if self.multi_class:
            one_hot = (self.clip_labels >= 0).all(axis=1) & (self.clip_labels.clip(0).sum(axis=1) == 1)
            unknown = (self.clip_labels == UNKNOWN_LABEL).all(axis=1)
            require(
                (one_hot | unknown).all(), "clip_labels", "gives a clip of a multi-class study not exactly one class"
            )
        require((self.clip_fold >= NO_FOLD).all(), "clip_fold", "is below -1")
        test = self.clip_split == TEST
        require((self.clip_fold[test] == NO_FOLD).all(), "clip_fold", "puts a test clip into a fold")
        present = np.bincount(self.sample_clip.clip(0), minlength=num_clips) > 0
        require(
            ((self.sample_clip >= 0) & (self.sample_clip < num_clips)).all(),
            "sample_clip",
            "points outside the clips",
        )
        require(present.all(), "sample_clip", "leaves a clip without samples")
        require(
            np.isin(self.sample_phase, ("", *PHASES)).all(), "sample_phase", f"is not all {' or '.join(PHASES)}, or ''"
        )
        samples = list(
            zip(self.sample_clip.tolist(), self.sample_view.tolist(), self.sample_phase.tolist(), strict=True)
        )
        require(len(set(samples)) == num_samples, "sample_phase", "gives two samples the same clip, view and phase")
        require(
            np.isin(self.member_status, (OK, DIVERGED)).all(),
            "member_status",
            f"is not all {OK} or {DIVERGED}",
        )
        require(
            np.isin(self.member_fold, self.clip_fold[~test]).all(),
            "member_fold",
            "names a fold without clips",
        )
        finished = self.probabilities[self.ok]
        require(
            bool(((finished >= 0) & (finished <= 1)).all()),
            "probabilities",
            f"of a member that is {OK} leaves [0, 1]",
        )
        sample_fold = self.clip_fold[self.sample_clip]  # (N,)
        forbidden = (sample_fold == self.member_fold[:, None]) | (sample_fold == NO_FOLD)  # (M, N)
        require(not (self.inner & forbidden).any(), "inner", "contains held-out or test samples")
        whole = self.inner_clips()[:, self.sample_clip]  # (M, N)
        require(np.array_equal(whole, self.inner), "inner", "splits the samples of a clip")
        rows = self.curve_sample
        require(((rows >= -1) & (rows < num_samples)).all(), "curve_sample", "points outside the samples")
        held_out = sample_fold[rows.clip(0)] == self.member_fold[:, None]
        require(((rows == -1) | held_out).all(), "curve_sample", "contains samples that are not held out")


def is_stream(modality: str) -> bool:
    """Whether an attention is over the model's streams (``streams1``, ``streams2``) instead of frames."""
    return re.fullmatch(r"streams\d+", modality) is not None


def _check_array(where, name, array, dims, kind, sizes) -> None:
    """Raises unless ``array`` has the named ``dims``, bound on first sight, and casts to ``kind``."""
    array = np.asarray(array)
    fits = array.dtype.kind == "U" if kind is np.str_ else np.can_cast(array.dtype, kind, "same_kind")
    if not fits:
        raise UserError(f"{where}: {name} holds {array.dtype} instead of {np.dtype(kind).name}; train the study again")
    expected = tuple(sizes.setdefault(d, n) for d, n in zip(dims, array.shape, strict=False))
    if array.ndim != len(dims) or array.shape != expected:
        named = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dims)
        raise UserError(f"{where}: {name} has shape {array.shape} instead of ({named}); train the study again")
