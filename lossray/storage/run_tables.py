"""The tables of training and of the work itself: runs, training, checkpoints, tasks."""

from lossray.storage.schema import (
    EVALUATION,
    FLAG,
    GRADIENT,
    INTEGER,
    LOSS,
    NUMBER,
    PARAMETER,
    RUN,
    STEP,
    TEXT,
    TIME,
    Column,
    TableSchema,
    key,
    number,
    volatile,
)

RUNS = TableSchema(
    "runs",
    1,
    "one run, at the end of its training",
    (
        RUN,
        Column("pack_id", TEXT, "", "the pack: runs trained together as one stack, differing in their seed"),
        Column("setting_id", TEXT, "", "the model and optimizer setting, shared with other seeds"),
        Column("model", TEXT, "", "the model's name"),
        Column("activation", TEXT, "", "the model's activation; null where it has none"),
        Column("norm", TEXT, "", "the model's normalisation: `none`, `batch`, `group`, `layer`"),
        Column("model_settings", TEXT, "", "all settings of the model, JSON"),
        Column("optimizer", TEXT, "", "the optimizer's name"),
        number("lr", "1", "base learning rate, before the schedule"),
        number(
            "weight_decay", "1", "the optimizer's weight decay; not part of any loss, gradient or Hessian"
        ),
        Column("schedule", TEXT, "", "learning-rate schedule: `constant`, `cosine` or `step`"),
        Column("optimizer_settings", TEXT, "", "all settings of the optimizer, JSON"),
        Column("adaptive", FLAG, "", "whether the optimizer scales each parameter by past gradients"),
        Column(
            "seed", INTEGER, "1", "seed of the run's initialisation, data order and dropout; null if recorded"
        ),
        Column("n_params", INTEGER, "parameters", "trainable parameters of the model"),
        Column("batch_size", INTEGER, "examples", "examples per step"),
        Column("loss", TEXT, "", "name of the loss"),
        Column("status", TEXT, "", "`finished`, `diverged` or `failed`"),
        Column("reason", TEXT, "", "why the run diverged or failed; null where it finished"),
        Column("diverged_at", INTEGER, "steps", "the step at which the run diverged; null where it did not"),
        Column("steps_done", INTEGER, "steps", "steps taken"),
        *EVALUATION,
        Column("data_fingerprint", TEXT, "", "hash of the contents of the data, after standardisation"),
        Column("dtype", TEXT, "", "number format of the training"),
        Column("executor", TEXT, "", "how the pack was computed: `vmap` (stacked) or `loop` (one by one)"),
        volatile("device", TEXT, "", "where the training ran: `cpu`, or the kind of GPU"),
        volatile("wall_seconds", NUMBER, "s", "training time of the run's pack"),
    ),
)

TRAINING = TableSchema(
    "training",
    1,
    "one logged step of one run",
    (
        RUN,
        key("step", INTEGER, "steps", "steps taken before; the row's update leads to the next"),
        number("train_loss", LOSS, "mean loss of the step's own batch, before the update, train mode"),
        number("validation_loss", LOSS, "mean loss on the validation split; null where not evaluated"),
        number("test_loss", LOSS, "mean loss on the test split; null where not evaluated"),
        number("test_accuracy", "1", "share of the test split classified correctly; null where not known"),
        number("lr", "1", "learning rate of the step, after the schedule"),
        number("gradient_norm", GRADIENT, "norm of the gradient of the step's batch, without weight decay"),
        number("update_norm", PARAMETER, "norm of the change that the step made, weight decay included"),
        Column("examples_seen", INTEGER, "examples", "examples used before the step"),
    ),
)

CHECKPOINTS = TableSchema(
    "checkpoints",
    1,
    "one checkpoint of one run",
    (
        RUN,
        STEP,
        Column("pack_id", TEXT, "", "the pack whose checkpoint file holds the run"),
        Column("member", INTEGER, "1", "the run's index in the stacked tensors of the file"),
        Column("path", TEXT, "", "the file, relative to the store"),
        Column("alive", FLAG, "", "false from the step at which the run diverged; its numbers are null then"),
        *EVALUATION,
        number("parameter_norm", PARAMETER, "norm of the parameters"),
        number(
            "distance_from_init",
            PARAMETER,
            "norm of the difference to the first checkpoint's, which is step 0 or the first recorded",
        ),
    ),
)

TASKS = TableSchema(
    "tasks",
    1,
    "one task; its part is the commit record",
    (
        key("task_key", TEXT, "", "hash of all that the task's result depends on"),
        Column(
            "kind",
            TEXT,
            "",
            "`checkpoint` (training up to one published checkpoint), `training` (a pack's end), `curvature` "
            "(of one checkpoint), `pair` (of one and the one before), `degeneracy` (of one checkpoint), "
            "`trajectory` and `surfaces` (of a pack), `separations` (of a pack and those before it), "
            "`connectivity` (paths of a pack's runs), `ensemble` (one method on a pack's runs), or `gather` "
            "(the task that made these tables)",
        ),
        Column("status", TEXT, "", "`done`, `diverged` (done, with a run that diverged) or `failed`"),
        Column("pack_id", TEXT, "", "the pack that the task worked on"),
        Column("run_id", TEXT, "", "the run, where the task worked on one only"),
        Column("step", INTEGER, "steps", "the checkpoint, where the task worked on one; the later of a pair"),
        Column("tables", TEXT, "", "the tables that the task published parts of, comma-separated"),
        volatile("attempts", INTEGER, "1", "executions, the successful one included"),
        volatile("wall_seconds", NUMBER, "s", "time of the successful execution"),
        volatile("queue_seconds", NUMBER, "s", "time between submission and start"),
        volatile("started", TIME, "", "start of the execution, UTC"),
        volatile("finished", TIME, "", "its end, UTC"),
        volatile("node", TEXT, "", "the machine"),
        volatile("device", TEXT, "", "`cpu`, or the kind of GPU"),
        volatile("peak_bytes", INTEGER, "bytes", "largest memory in use, of the GPU where the task has one"),
        volatile(
            "products",
            INTEGER,
            "products",
            "products of a curvature operator with a vector that the task has computed, those of every run "
            "counted; null where the task trained or failed",
        ),
        volatile(
            "published_bytes",
            INTEGER,
            "bytes",
            "size of the parts, checkpoints and eigenvectors that the task has written before its record",
        ),
        volatile(
            "reduced",
            TEXT,
            "",
            "what was held at once after memory had run out, such as `4 of 16 runs at a time`; null where it "
            "was all",
        ),
        volatile("error", TEXT, "", "why the task failed; null where it did not"),
        Column(
            "versions",
            TEXT,
            "",
            "versions of the numbers and tables in its key, such as `curvature 4, table eigenvalues 1`; null "
            "from before they were recorded",
        ),
        volatile("lossray_version", TEXT, "", "the lossray that computed it; null likewise"),
        volatile("torch_version", TEXT, "", "the torch that it was computed with; null likewise"),
    ),
)
