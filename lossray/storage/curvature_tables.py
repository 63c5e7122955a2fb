"""The tables of curvature: eigenvalues, density, curvature, sharpness, degeneracy."""

from lossray.storage.schema import (
    BLOCK,
    CURVATURE,
    FLAG,
    GRADIENT,
    INTEGER,
    LOSS,
    NUMBER,
    OPERATOR,
    RUN,
    STEP,
    TEXT,
    Column,
    TableSchema,
    key,
    number,
)

EIGENVALUES = TableSchema(
    "eigenvalues",
    1,
    "one eigenvalue of one operator at one checkpoint",
    (
        RUN,
        STEP,
        OPERATOR,
        BLOCK,
        key("end", TEXT, "", "`largest` or `smallest` (algebraic) end of the spectrum"),
        key("index", INTEGER, "1", "0 is the outermost eigenvalue of its end"),
        number("eigenvalue", CURVATURE, "the Ritz value"),
        number("residual", CURVATURE, "|Hv - lambda v| of the unit Ritz vector, from a product of its own"),
        number(
            "product_error",
            CURVATURE,
            "|(H - H in float64) v| for the top vector of the solve: the residual certifies H as computed; "
            "in float64 |H(cv)/c - Hv|, which shows lower precisions inside the model",
        ),
        Column("converged", FLAG, "", "whether the residual met the tolerance"),
        number("gap", CURVATURE, "distance to the nearest other Ritz value; residual/gap bounds the error"),
        number("ipr", "1", "inverse participation ratio sum v_i^4 of the vector: 1/d spread, 1 localised"),
    ),
)

DENSITY = TableSchema(
    "density",
    1,
    "one node of one probe's estimate of the eigenvalue distribution of one operator at one checkpoint",
    (
        RUN,
        STEP,
        OPERATOR,
        BLOCK,
        key("probe", INTEGER, "1", "the random vector; one alone where all eigenvalues are known"),
        key("index", INTEGER, "1", "nodes in ascending order"),
        number("node", CURVATURE, "a known eigenvalue, or a node of the quadrature of the others"),
        number("weight", "1", "its share of all eigenvalues; the weights of a probe sum to 1"),
    ),
)

CURVATURES = TableSchema(
    "curvature",
    1,
    "one operator at one checkpoint",
    (
        RUN,
        STEP,
        OPERATOR,
        BLOCK,
        number("lambda_max", CURVATURE, "largest eigenvalue"),
        number("lambda_min", CURVATURE, "smallest (algebraic) eigenvalue"),
        Column(
            "confirmed",
            FLAG,
            "",
            "whether a fresh search of the complement found nothing above the last of the top eigenvalues",
        ),
        number("trace", CURVATURE, "estimate of the trace"),
        number("trace_stderr", CURVATURE, "its standard error; here and below 0 where the value is exact"),
        number("frobenius_norm", CURVATURE, "estimate of the Frobenius norm"),
        number("frobenius_norm_stderr", CURVATURE, "its standard error, of the sampling"),
        number("frobenius_norm_bound", CURVATURE, "bound of its error from the pairs' residuals"),
        number("negative_mass", "1", "sum of |lambda| over negative eigenvalues, over the sum over all"),
        number("negative_mass_stderr", "1", "its standard error, of the sampling"),
        number(
            "negative_mass_bound",
            "1",
            "bound of the quadrature's error; the interval is value +- (t stderr + bound)",
        ),
        number("participation", "1", "(sum |lambda|)^2 / sum lambda^2: how many eigenvalues dominate"),
        number("participation_stderr", "1", "its standard error, of the sampling"),
        number("participation_bound", "1", "bound of the quadrature's error"),
        number("effective_dimension", "1", "sum of lambda / (lambda + regulariser) over positive lambda"),
        number("effective_dimension_stderr", "1", "its standard error, of the sampling"),
        number("effective_dimension_bound", "1", "bound of the quadrature's error"),
        number("effective_dimension_regulariser", CURVATURE, "the regulariser in it: |lambda|max / 100"),
        Column("matvecs", INTEGER, "products", "products of the operator with a vector, all told"),
        number("orthogonality_loss", "1", "largest |Q'Q - I| of the Krylov basis"),
        number(
            "derivative_error",
            "1",
            "relative difference of autograd's derivatives and a finite difference along a random direction; "
            "null where it cannot be told, at a kink or from rounding",
        ),
        Column("dim", INTEGER, "1", "order of the operator: parameters in the block"),
        Column("n_examples", INTEGER, "examples", "size of the analysis set"),
        Column("data_fingerprint", TEXT, "", "hash of the analysis set's contents"),
        number("loss", LOSS, "mean loss on the analysis set"),
        number("gradient_norm", GRADIENT, "norm of the gradient of that loss"),
        Column("reg_included", FLAG, "", "whether weight decay is part of loss, gradient and operator"),
        Column("product_mode", TEXT, "", "how products were computed"),
        Column("dtype", TEXT, "", "number format of the products; the recurrence is always float64"),
    ),
)

SHARPNESS = TableSchema(
    "sharpness",
    1,
    "the sharpness of one run at one checkpoint, beside what its optimizer can bear",
    (
        RUN,
        STEP,
        number(
            "lr",
            "1",
            "learning rate of the next step, after the schedule; of a recorded run whose parameter groups "
            "have rates of their own the largest of them, to which its preconditioner belongs",
        ),
        number("lambda_max", CURVATURE, "largest eigenvalue of the Hessian of the analysis set"),
        number("lambda_max_residual", CURVATURE, "its residual"),
        number(
            "lambda_max_lr", "1", "lambda_max times lr; null where parameter groups have rates of their own"
        ),
        number(
            "preconditioned_lambda_max",
            "1/lr",
            "largest eigenvalue of P^-1/2 H P^-1/2, P the optimizer's preconditioner; null if there is none",
        ),
        number("preconditioned_lambda_max_residual", "1/lr", "its residual"),
        number("preconditioned_lr", "1", "preconditioned_lambda_max times lr"),
        number(
            "batch_sharpness",
            CURVATURE,
            "E[g_B'H_B g_B] / E|g_B|^2 over minibatches B of the training split, in eval mode",
        ),
        number("batch_sharpness_stderr", CURVATURE, "its standard error; 0 for full batches"),
        Column("batches", INTEGER, "1", "minibatches in that mean"),
        number(
            "critical_sharpness",
            "1/lr",
            "2 / lr_c, lr_c the smallest learning rate at which the next update, so scaled, raises the loss "
            "of the analysis set; 0 where none up to a million times lr does, null where every rate does or "
            "the loss falls by less than its rounding",
        ),
        number(
            "threshold",
            "1",
            "lr times sharpness above which the optimizer is unstable on a quadratic (theory 2.10): to be "
            "compared with preconditioned_lr (the same as lambda_max_lr for sgd and momentum)",
        ),
    ),
)

DEGENERACY = TableSchema(
    "degeneracy",
    1,
    "the eigenvalues of one operator below one threshold at one point",
    (
        RUN,
        STEP,
        key(
            "operator",
            TEXT,
            "",
            "`hessian`, `ggn`, or `adaptive`: |theta| o H o |theta|, which no rescaling of units changes",
        ),
        key("point", TEXT, "", "`checkpoint`, or `polished`: moved on from it to a critical point"),
        key("method", TEXT, "", "`dense` (all eigenvalues), `gram` (exact, ggn only) or `quadrature`"),
        key("tau", NUMBER, "1", "the threshold as a share of |lambda|max"),
        number("threshold", CURVATURE, "tau times |lambda|max"),
        Column("at_noise_floor", FLAG, "", "whether this threshold is the noise floor"),
        number("nullity", "1", "eigenvalues with |lambda| <= threshold"),
        number("nullity_stderr", "1", "its standard error; 0 where all eigenvalues are known"),
        number("quadrature_bias", "1", "what the quadrature of [curvature] finds more, where all are known"),
        Column(
            "structural_nullity",
            INTEGER,
            "1",
            "null directions that architecture, data and loss force; a lower bound where excess is null",
        ),
        Column("structural_note", TEXT, "", "why there is no structural_nullity"),
        number(
            "excess", "1", "nullity minus structural_nullity; null without a rank, or if more may be forced"
        ),
        number("gap", "1", "smallest |lambda| above the threshold over the largest below, as computed"),
        number("noise_floor", CURVATURE, "below it an eigenvalue cannot be told from 0"),
        Column(
            "rank",
            INTEGER,
            "1",
            "dim minus nullity where the gap exceeds 1e3 whatever the rounding, otherwise null",
        ),
        Column("rank_at_least", INTEGER, "1", "eigenvalues known to exceed the threshold (interlacing)"),
        Column("dim", INTEGER, "1", "order of the operator"),
        number("lambda_max", CURVATURE, "|lambda|max"),
        number("gradient_norm", GRADIENT, "|g| at the point: 0 at a critical point"),
        number("symmetry_residual", GRADIENT, "largest |H K theta| over the hidden units (theory 2.1)"),
        Column("n_examples", INTEGER, "examples", "size of the analysis set"),
        Column("dtype", TEXT, "", "number format of the products"),
    ),
)
