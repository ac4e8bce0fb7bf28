"""Triple-stream MicroAttNet on dual-view, phase-aware optical flow (Nguyen et al. 2026) and its ablations.

    python scripts/train.py --config configs/micro_attnet.py

Variants: ``configs/micro_attnet.py:micro_attnet`` (default), ``:no_attention``, ``:no_se`` and ``:neither`` (the rows
of the paper's table 2), and ``:full`` (the paper's 224 x 224 pixels and more channels, for a GPU).

From the paper: crops by the largest face box, the apex by Farneback flow, u, v and magnitude of both phases, focal
loss, Adam at a constant 1e-4, batches of 32, 50 epochs, early stopping on the validation loss (here an inner split of
the training folds), one threshold for all labels. It leaves the sizes of the network unsaid; the values here are
ours and light: 56 x 56 pixels hold what flow of a 15 px window can tell, and the classifier's first layer, which holds
nearly all weights, stays below 0.3 million, as a hundred clips ask for.
"""

from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.study.config import base_config

VARIANTS = ("micro_attnet", "no_attention", "no_se", "neither", "full")


def get_config(variant: str = "micro_attnet") -> ConfigDict:
    """The config of one of ``VARIANTS``."""
    if variant not in VARIANTS:
        raise UserError(f"configs/micro_attnet.py:{variant}: no such variant; there are {', '.join(VARIANTS)}")
    config = base_config()
    config.name = "micro_attnet" if variant == "micro_attnet" else f"micro_attnet_{variant}"

    data = config.data
    data.dataset = "four_dme_flow/demo"  # or 'four_dme_flow/challenge', 'four_dme_flow/release'
    data.data_dir = "data"  # where data sets are built
    # Where 'challenge' and 'release' must still be built, what scripts/build_data.py takes as flags of these names.
    data.source = ""
    data.test_source = ""
    data.labels = ""
    data.columns = ()  # such as ('Id=video', 'subject=person')
    data.workbook = ""
    data.workers = 0  # processes that prepare clips; 0 for one a core
    # Section 3.1: the largest face box of all frames ('first' takes the first frame's, as the fusion system does).
    data.crop = ConfigDict({"rule": "largest", "scale": 1.5, "square": True, "size": 224})
    # Section 3.2; 'compensate' takes the motion of the head out of the flow before it is summed, 'blink' lets count
    # little what moves for less than half as many frames, 'smooth' is the sd in frames of a smoothing of the sums.
    # ('none', 0, 0) is the paper's plain rule.
    data.apex = ConfigDict({"use_annotated": True, "compensate": "rigid", "blink": 7, "smooth": 1.0})
    # Section 3.3; 'farneback' by 'opencv' or by 'jax', or 'tvl1'.
    data.flow = ConfigDict(
        {
            "method": "farneback",
            "backend": "opencv",
            "pyr_scale": 0.5,
            "levels": 3,
            "winsize": 15,
            "iterations": 3,
            "poly_n": 5,
            "poly_sigma": 1.2,
            "gaussian_window": False,
        }
    )
    data.phases = ("onset_apex", "apex_offset")  # section 3.4: both are samples of their clip
    data.channels = ("u", "v", "m")  # the streams; of 'u', 'v', 'm' and 'strain'
    data.size = 56  # flow is averaged down to so many pixels a side; 0 keeps what is stored
    data.normalise = "scale"  # 'none', 'standard', 'scale' (both fitted on the training folds), 'sample', 'instance'
    data.flip = 0.0  # probability of a mirror image in training
    data.shift = 0  # greatest shift in training, in pixels

    model = config.model = ConfigDict()
    model.name = "micro_attnet"
    model.attention = variant not in ("no_attention", "neither")  # Fusion Attention
    model.se_stream = "" if variant in ("no_se", "neither") else "m"  # the stream with Squeeze-and-Excitation
    model.features = (8, 16)  # channels of the two blocks
    model.kernels = (5, 3)
    model.pools = (3, 2)
    model.attention_hidden = 16
    model.se_reduction = 4
    model.hidden_dim = 64

    train = config.train
    train.optimiser = "adam"
    train.schedule = "constant"
    train.warmup_fraction = 0.0
    train.learning_rate = 1e-4
    train.weight_decay = 0.0
    train.batch_size = 32  # samples: a phase of a view
    train.epochs = 50
    train.patience = 10
    train.loss = "focal"
    train.focal_gamma = 2.0
    train.dropout = 0.5  # before the last layer
    train.feature_dropout = 0.1  # of whole channels in the blocks

    config.evaluation.thresholds = "global"
    config.evaluation.fixed_threshold = (0.2,)  # the paper's

    if variant == "full":
        data.size = 224
        model.features = (32, 64)
        model.pools = (8, 4)
        model.hidden_dim = 256
    return config
