"""The tables of directions in parameter space (angles to eigenspaces among them), and of places in it."""

from lossray.storage.schema import (
    BLOCK,
    CURVATURE,
    DIRECTION,
    FLAG,
    GAUGE,
    INTEGER,
    LOSS,
    OPERATOR,
    PARAMETER,
    RUN,
    STEP,
    SUBSPACE,
    TEXT,
    Column,
    TableSchema,
    key,
    number,
)

DIRECTIONS = TableSchema(
    "directions",
    2,
    "one direction u at one checkpoint",
    (
        RUN,
        STEP,
        DIRECTION,
        number("norm", "loss/parameter or parameter", "|u|: a gradient's, or a displacement's"),
        number("curvature", CURVATURE, "u'Hu / u'u with the Hessian H of the analysis set"),
        number(
            "finite_step_curvature",
            CURVATURE,
            "[L(theta + s) - 2 L(theta) + L(theta - s)] / |s|^2 in float64, s the real step along u (u "
            "itself for an update or a displacement, lr u for a gradient or a momentum): it sees the kinks "
            "of ReLU, which the Hessian misses",
        ),
        number("finite_step_curvature_noise", CURVATURE, "its rounding error, estimated on the safe side"),
        number("step_norm", PARAMETER, "|s|"),
        number("relative_curvature", "1", "curvature over trace/d, the mean over all directions"),
        number("relative_curvature_stderr", "1", "its standard error, from that of the trace"),
        number("sharpness_share", "1", "curvature over lambda_max"),
        number("cosine_with_gradient", "1", "cosine of the angle to the gradient of the analysis set"),
    ),
)

SHARES = TableSchema(
    "shares",
    1,
    "one layer's part of one direction u at one checkpoint",
    (
        RUN,
        STEP,
        DIRECTION,
        key("block", TEXT, "", "the layer"),
        number("energy_share", "1", "|u_l|^2 / |u|^2 with u_l the layer's part of u; a direction's sum to 1"),
        number(
            "curvature_part",
            CURVATURE,
            "u_l'(Hu)_l / u'u; a direction's sum to its curvature, couplings between layers are split evenly",
        ),
        Column("dim", INTEGER, "1", "parameters in the layer"),
        number(
            "curvature_within",
            CURVATURE,
            "u_l'H u_l / u'u, what the layer's part meets by itself; null unless [angles] layers is true",
        ),
        number(
            "curvature_across",
            CURVATURE,
            "u_l'H (u - u_l) / u'u, what other layers bring: the two sum to curvature_part; null likewise",
        ),
    ),
)

ANGLES = TableSchema(
    "angles",
    2,
    "the angle of one direction to one eigenspace, in one gauge, at one checkpoint",
    (
        RUN,
        STEP,
        DIRECTION,
        GAUGE,
        SUBSPACE,
        number("cosine", "1", "cosine of the angle between direction and subspace, >= 0"),
        number("angle_degrees", "degrees", "that angle, 0 to 90"),
        number("energy", "1", "chi^2, the squared cosine: the direction's share inside the subspace"),
        number("null_ratio", "1", "energy over its mean k/d for a random direction"),
        number("null_p", "1", "P(Beta(k/2, (d-k)/2) >= energy): small if unusually aligned"),
        number("null_p_lower", "1", "P(Beta(k/2, (d-k)/2) <= energy): small if unusually perpendicular"),
        number(
            "sign_flip_null", "1", "mean energy over random signs of the direction's components, closed form"
        ),
        number("layer_null", "1", "mean energy of a random direction with the same norm in every layer"),
        Column("k", INTEGER, "1", "dimension of the subspace"),
        Column("dim", INTEGER, "1", "dimension d of the space, dropped coordinates apart"),
        Column("dropped", INTEGER, "1", "coordinates that the gauge scales by zero, and which are left out"),
        Column("resolved", FLAG, "", "whether the subspace is: its residual/gap is below 0.1"),
    ),
)

ALIGNMENT = TableSchema(
    "alignment",
    1,
    "the alignment of one direction over a window of steps with one eigenspace at its start, in one gauge",
    (
        RUN,
        key("step", INTEGER, "steps", "steps taken at the start of the window, a checkpoint"),
        DIRECTION,
        GAUGE,
        SUBSPACE,
        number("log_energy", "1", "S = ln[sum |V'u|^2 / sum |u|^2] over the window, V fixed at its start"),
        Column("steps", INTEGER, "steps", "steps in the window"),
        number("sign_flip_null", "1", "mean of exp(S) over random signs of the directions' components"),
        number("layer_null", "1", "mean of exp(S) for random directions with the same norms in every layer"),
        number(
            "isotropic_null",
            "1",
            "mean of S for the same window turned at random, as a whole, in the raw coordinates and then "
            "taken into the gauge: directions that are as persistent and know nothing of the surface",
        ),
        Column("k", INTEGER, "1", "dimension of the subspace"),
        Column("dim", INTEGER, "1", "dimension d of the space, dropped coordinates apart"),
        Column("dropped", INTEGER, "1", "coordinates that the gauge scales by zero, and which are left out"),
        Column("resolved", FLAG, "", "whether the subspace is: its residual/gap is below 0.1"),
    ),
)

TRAJECTORY = TableSchema(
    "trajectory",
    1,
    "one checkpoint of one run on the principal axes of that run's checkpoints",
    (
        RUN,
        STEP,
        *(number(f"pc{i}", PARAMETER, f"coordinate on principal axis {i}") for i in (1, 2, 3)),
        *(number(f"explained{i}", "1", f"share of the variance along axis {i}") for i in (1, 2, 3)),
        *(
            number(
                f"random_walk{i}", "1", f"that share for a random walk with the same checkpoints, axis {i}"
            )
            for i in (1, 2, 3)
        ),
        Column("dim", INTEGER, "1", "number of parameters"),
    ),
)

SEPARATIONS = TableSchema(
    "separations",
    1,
    "two runs of one setting at one step",
    (
        key("run_a", TEXT, "", "one run"),
        key("run_b", TEXT, "", "the other"),
        STEP,
        number("distance", PARAMETER, "|theta_a - theta_b|"),
        number("cosine", "1", "cosine of the angle between theta_a and theta_b"),
        number(
            "displacement_cosine", "1", "cosine of the angle between their displacements since the first step"
        ),
        Column("dim", INTEGER, "1", "number of parameters"),
    ),
)

SURFACES = TableSchema(
    "surfaces",
    1,
    "the loss at one point of one line or plane through a checkpoint",
    (
        key("surface_id", TEXT, "", "the line or plane: <run_id>-<step>-<kind>"),
        key("i", INTEGER, "1", "index along the first axis"),
        key("j", INTEGER, "1", "index along the second axis; 0 on a line"),
        Column("run_id", TEXT, "", "the run"),
        Column("step", INTEGER, "steps", "the checkpoint at x = y = 0"),
        Column(
            "kind",
            TEXT,
            "",
            "`v1` (line along the top eigenvector), `eigenvectors` (plane of the top two), `pca` (plane of "
            "the run's first two principal axes), `random` (of two random directions, filter-normalised)",
        ),
        number("x", "1", "coordinate along the first axis, in units of `x_norm`"),
        number("y", "1", "coordinate along the second axis, in units of `y_norm`; 0 on a line"),
        number("x_norm", PARAMETER, "length of the first axis vector"),
        number("y_norm", PARAMETER, "length of the second axis vector; null on a line"),
        number("loss", LOSS, "mean loss on the analysis set"),
        number("accuracy", "1", "share of the analysis set classified correctly; null in regression"),
    ),
)

OVERLAPS = TableSchema(
    "overlaps",
    1,
    "the leading eigenspace of one dimension at one checkpoint and at the one before",
    (
        RUN,
        key("step", INTEGER, "steps", "optimizer steps taken at the later checkpoint"),
        key("previous_step", INTEGER, "steps", "those at the earlier one, its neighbour"),
        OPERATOR,
        BLOCK,
        key("k", INTEGER, "1", "dimension of the eigenspaces: 1, 5, 10, C-1, C, 2C for C outputs, and `top`"),
        number("subspace_overlap", "1", "|V'W|_F^2 / k of their orthonormal bases: 1 the same, 0 orthogonal"),
        number("chance", "1", "k/d: its mean for random subspaces"),
        Column("dim", INTEGER, "1", "dimension d of the space"),
        Column("resolved", FLAG, "", "whether both eigenspaces are: their residual/gap is below 0.1"),
    ),
)
