"""The tables of paths between models, and of ensembles."""

import pyarrow as pa

from lossray.storage.schema import (
    CURVATURE,
    EVALUATION,
    INTEGER,
    LOSS,
    NUMBER,
    PARAMETER,
    TEXT,
    Column,
    TableSchema,
    key,
    number,
)

FLOATS = pa.list_(pa.float32())

PAIR = key("pair_id", TEXT, "", "the two runs, and what was aligned: `RUN_A~RUN_B`, `RUN_A~RUN_B@both`")
PATH_KIND = key("kind", TEXT, "", "`line`, `geometric` (D^t theta), `polychain` or `bezier`")
ENDS = (
    Column("run_a", TEXT, "", "the run at t = 0"),
    Column("run_b", TEXT, "", "the run at t = 1; in a geometric pair the rescaled copy of the same run"),
    Column("setting_id", TEXT, "", "the model and optimizer setting of both"),
    Column(
        "aligned",
        TEXT,
        "",
        "what was done to run_b first: `none`, `permutation`, `scale` or `both`; `rescaled`: run_b is a "
        "rescaled copy of run_a",
    ),
)

PATHS = TableSchema(
    "paths",
    1,
    "one point of one path between two runs' last checkpoints",
    (
        PAIR,
        PATH_KIND,
        key("t", NUMBER, "1", "place on the path, 0 to 1; both ends are the runs themselves, bit for bit"),
        *ENDS,
        *EVALUATION,
        number("arc_length", PARAMETER, "length of the path from t = 0"),
    ),
)

BARRIERS = TableSchema(
    "barriers",
    1,
    "one path between two runs' last checkpoints",
    (
        PAIR,
        PATH_KIND,
        *ENDS,
        Column("bends", INTEGER, "1", "control points between the ends"),
        number(
            "barrier",
            LOSS,
            "max_t of L(t) - ((1 - t) L(0) + t L(1)), L the training loss (2110.06296); here and in what "
            "follows batch norm has the statistics of the training examples at every t, the ends included",
        ),
        number("barrier_test", LOSS, "the same of the test loss"),
        number("barrier_frankle", "1", "largest test error minus the mean of the ends' (1912.05671)"),
        number("barrier_frankle_train", "1", "the same of the training error"),
        number("max_loss", LOSS, "largest training loss on the path"),
        number("max_loss_t", "1", "where"),
        number("mean_loss", LOSS, "training loss averaged over the path's length"),
        number("endpoint_distance", PARAMETER, "distance of the ends"),
        number("distance_before", PARAMETER, "the same before the alignment"),
        number("path_length", PARAMETER, "length of the path"),
        number(
            "function_change",
            "1",
            "largest difference of run_b's training outputs before and after the alignment or rescaling, "
            "over the largest output, both in float64: rounding",
        ),
        number("gradient_examples", "examples", "gradient evaluations that training the path took"),
        Column("status", TEXT, "", "`done`, or `diverged` while the path was trained"),
    ),
)

METHOD = key("method", TEXT, "", "how the members were made; see `lossray.ensembles.methods.METHODS`")
BASE_RUN = key("base_run", TEXT, "", "the run that the method starts from")
BUDGET = key(
    "nominal_budget",
    NUMBER,
    "trainings",
    "what the method may spend, the base included, in trainings of a run",
)
SPLIT = key("split", TEXT, "", "`validation` or `test`")
ENSEMBLE = key("ensemble_id", TEXT, "", "`BASE_RUN/METHOD/NOMINAL_BUDGET`")
ENSEMBLE_PARTS = (
    Column("method", TEXT, "", "how the members were made"),
    Column("base_run", TEXT, "", "the run that the method starts from"),
    Column("nominal_budget", NUMBER, "trainings", "what the method may spend"),
)

ENSEMBLES = TableSchema(
    "ensembles",
    1,
    "one score of the first members of one ensemble on one split",
    (
        METHOD,
        BASE_RUN,
        BUDGET,
        key("members", INTEGER, "1", "how many: the first 1, 2, ... in the method's order, up to all"),
        SPLIT,
        key(
            "metric",
            TEXT,
            "",
            "`error`, `nll`, `brier`, `ece`, `adaptive_ece`, `aurc` of the mean of the softmax outputs; "
            "`nll_scaled`, `brier_scaled`, `ece_scaled`, `adaptive_ece_scaled` after temperature scaling; "
            "`temperature`, fitted on the validation split; `member_error`, `member_nll`, the members' mean; "
            "`disagreement`, `kl`, the mean over pairs (null for one member)",
        ),
        Column("ensemble_id", TEXT, "", "`BASE_RUN/METHOD/NOMINAL_BUDGET`"),
        Column("setting_id", TEXT, "", "the model and optimizer setting of the base run"),
        Column("seed", INTEGER, "1", "of the base run"),
        number("value", "1", "the score: a share, or nats for `nll`, `nll_scaled`, `kl`, `member_nll`"),
        number(
            "budget",
            "examples",
            "gradients of single examples that these members took, the base run's training included; a "
            "forward pass alone counts 1/3, a Hessian-vector product 2",
        ),
        Column("size", INTEGER, "1", "all members of the ensemble"),
        Column("n_examples", INTEGER, "examples", "in the split"),
        Column(
            "status", TEXT, "", "`done`, or `diverged`: a member's training diverged, and scores are null"
        ),
    ),
)

MEMBERS = TableSchema(
    "members",
    1,
    "one pair of members of one ensemble, on the test split",
    (
        ENSEMBLE,
        key("i", INTEGER, "1", "index of a member"),
        key("j", INTEGER, "1", "index of another, larger than i"),
        *ENSEMBLE_PARTS,
        number("disagreement", "1", "share of examples whose predicted classes differ"),
        number("kl", "nats", "(KL(p_i || p_j) + KL(p_j || p_i)) / 2, mean over examples"),
        number(
            "weight_distance",
            PARAMETER,
            "distance of their parameters as the method leaves them: `rescale_retrain` takes its members "
            "back to the base run's gauge, `rescale_curve` does not",
        ),
        number(
            "barrier",
            LOSS,
            "of the loss on the first 256 training examples, on the straight line between them at t = 1/4, "
            "1/2 and 3/4",
        ),
    ),
)

LOGITS = TableSchema(
    "logits",
    1,
    "the outputs of one member of one ensemble on one split",
    (
        ENSEMBLE,
        key("member", INTEGER, "1", "index of the member"),
        SPLIT,
        *ENSEMBLE_PARTS,
        Column("n_examples", INTEGER, "examples", "in the split"),
        Column("n_outputs", INTEGER, "1", "classes"),
        Column("logits", FLOATS, "1", "outputs, n_examples x n_outputs, row after row; the split's order"),
    ),
)

PREDICTIONS = TableSchema(
    "predictions",
    1,
    "the example-wise scores of one whole ensemble on one split",
    (
        ENSEMBLE,
        SPLIT,
        *ENSEMBLE_PARTS,
        Column("setting_id", TEXT, "", "the model and optimizer setting of the base run"),
        Column("seed", INTEGER, "1", "of the base run"),
        Column("nll", FLOATS, "nats", "of each example, from the mean of the softmax outputs"),
        Column("nll_scaled", FLOATS, "nats", "after temperature scaling"),
        Column("error", FLOATS, "1", "1 where the example is classified wrongly, 0 elsewhere"),
    ),
)

RESCALINGS = TableSchema(
    "rescalings",
    1,
    "one rescaling theta -> D theta of a base run by one method",
    (
        ENSEMBLE,
        key("cycle", INTEGER, "1", "0, 1, ...: the method's rescalings in their order"),
        *ENSEMBLE_PARTS,
        number("sigma", "1", "standard deviation of ln(factor) of the hidden units, after halvings"),
        number(
            "lambda_max_before", CURVATURE, "largest Hessian eigenvalue at theta (a lower bound, by Lanczos)"
        ),
        number("lambda_max_after", CURVATURE, "the same at D theta"),
        number("function_change", "1", "largest difference of the outputs over the largest output: rounding"),
        number("distance", PARAMETER, "|D theta - theta|"),
        number("line_barrier", LOSS, "of the training loss on the straight line from theta to D theta"),
        Column("dead_units", INTEGER, "1", "hidden units that no training example makes active: factor 1"),
    ),
)
