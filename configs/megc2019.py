r"""The MEGC2019 composite of CASME II, SAMM and SMIC: three classes, one subject left out at a time.

    python scripts/train.py --config configs/megc2019.py --config.data.dataset=megc2019/folder \
        --config.data.source=STSNet_whole_norm_u_v_os --config.data.labels=combined_3_class2_for_optical_flow.csv

Variants: ``configs/megc2019.py:micro_attnet`` (default), ``:ststnet`` (the authors' recipe: Adam 5e-5, batches of 256,
800 epochs, the last one kept) and ``:micro_attnet_search``. Without a source a stand-in made of demo clips is used, on
which numbers mean nothing.

The folds are subjects, all predictions are pooled before UF1 and UAR are computed, and the last epoch is scored; what
choosing each subject's best test epoch would have claimed stands beside it, labelled leaky.

``:micro_attnet_search`` chooses learning rate, weight decay, dropout rates and the exponent of the focal loss, for each
left-out subject by itself, on inner splits of the other subjects: 68 folds x 12 candidates x 5 seeds. Inner subjects
give no gradients, so its members learn from four fifths of what ``:micro_attnet`` learns from.
"""

from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.study.config import base_config

VARIANTS = ("micro_attnet", "ststnet", "micro_attnet_search")


def get_config(variant: str = "micro_attnet") -> ConfigDict:
    """The config of one of ``VARIANTS``."""
    if variant not in VARIANTS:
        raise UserError(f"configs/megc2019.py:{variant}: no such variant; there are {', '.join(VARIANTS)}")
    config = base_config()
    config.name = f"megc2019_{variant}"
    config.folds.scheme = "loso"
    config.study.num_seeds = 5
    config.study.num_inner = 0  # nothing is chosen: all other subjects train, the last epoch counts
    config.evaluation.thresholds = "argmax"

    data = config.data
    data.dataset = "megc2019/demo"  # 'megc2019/folder' (flow images), 'megc2019/raw' (frames) or 'megc2019/demo'
    data.data_dir = "data"  # where data sets are built
    data.source = ""  # 'folder': the folder of flow images
    data.labels = ""  # 'folder': the CSV beside it
    data.casme2 = ""  # 'raw': the folders of the databases, any of them
    data.samm = ""
    data.smic = ""
    data.casme2_sheet = ""  # 'raw': their coding sheets
    data.samm_sheet = ""
    # 'raw': how flow is made of the frames; leave it as it is for the others.
    data.raw = ConfigDict()
    # The face box of the first frame, of the frame where it is 'largest', or no box ('whole', for cropped releases).
    data.raw.crop = ConfigDict({"rule": "first", "scale": 1.5, "square": True, "size": 224})
    # The apex where the sheet tells none: the frame 'half_way', or by 'motion' (as in configs/micro_attnet.py, whose
    # other fields these are; use_annotated=False finds all by motion).
    data.raw.apex = ConfigDict(
        {"rule": "half_way", "use_annotated": True, "compensate": "rigid", "blink": 7, "smooth": 1.0}
    )
    data.raw.flow = ConfigDict(
        {
            "method": "tvl1",  # with the fields from 'tau' on, or 'farneback' by 'opencv' or 'jax'
            "backend": "opencv",
            "pyr_scale": 0.5,
            "levels": 3,
            "winsize": 15,
            "iterations": 3,
            "poly_n": 5,
            "poly_sigma": 1.2,
            "gaussian_window": False,
            "tau": 0.25,
            "lambda_": 0.15,
            "theta": 0.3,
            "scales": 5,
            "scale_step": 0.8,
            "warps": 5,
            "epsilon": 0.01,
            "inner_iterations": 30,
            "outer_iterations": 10,
            "gamma": 0.0,
            "median_filtering": 5,
        }
    )
    data.raw.size = 28  # side of the maps that are stored, in pixels
    data.raw.store = "image"  # 8-bit images of u, v and strain like the published ones, or 'flow': u and v in px
    data.workers = 0  # processes that prepare clips; 0 for one a core
    data.phases = ("onset_apex",)
    data.channels = ("strain", "v", "u")  # in the order in which STSTNet's authors read the images
    data.size = 0  # pixels a side to which a model's input is averaged down; 0 keeps what is stored
    # 'none' keeps 0 to 255; 'standard', 'scale' (both fitted on the training folds), 'sample', 'instance'.
    data.normalise = "none"
    data.flip = 0.0
    data.shift = 0

    train = config.train
    train.optimiser = "adam"
    train.warmup_fraction = 0.0
    train.weight_decay = 0.0
    model = config.model = ConfigDict()
    model.name = "ststnet" if variant == "ststnet" else "micro_attnet"
    if variant == "ststnet":
        train.schedule = "constant"
        train.learning_rate = 5e-5
        train.batch_size = 256
        train.epochs = 800
        train.dropout = 0.5
        config.study.epochs_per_call = 20
        return config

    data.channels = ("u", "v", "strain")
    data.normalise = "standard"
    data.flip = 0.5
    data.shift = 2
    model.attention = True
    model.se_stream = "strain"  # the channel of intensity, as the magnitude is in the challenge's data
    model.features = (16, 32)
    model.kernels = (5, 3)
    model.pools = (2, 2)
    model.attention_hidden = 16
    model.se_reduction = 4
    model.hidden_dim = 64
    train.schedule = "cosine"
    train.learning_rate = 1e-3
    train.weight_decay = 1e-4
    train.batch_size = 64
    train.epochs = 100
    train.loss = "focal"
    train.focal_gamma = 2.0
    train.class_weights = "balanced"
    train.dropout = 0.5
    train.feature_dropout = 0.2
    if variant == "micro_attnet_search":
        config.study.num_inner = 5  # the five seeds of a fold take turns at its parts, which are whole subjects
        config.study.num_candidates = 12
        config.search.learning_rate = ("log_uniform", 1e-4, 1e-2)
        config.search.weight_decay = ("log_uniform", 1e-5, 1e-2)
        config.search.dropout = ("uniform", 0.0, 0.7)
        config.search.feature_dropout = ("uniform", 0.0, 0.4)
        config.search.focal_gamma = ("choice", 0, 1, 2, 3)
    return config
