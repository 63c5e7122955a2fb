"""What drives a study: the plan, the driver loop, progress, and the command line."""

from collections.abc import Sequence
from pathlib import Path


def run(
    study: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    in_process: bool = False,
    recompute: bool = False,
) -> int:
    """``lossray run`` for a notebook: run or resume a study.

    Args:
        study: a study file, or the name of a ready-made study.
        out: the store, a folder or a URI.
        overrides: settings as in ``--set``, e.g. ``"training.steps=200"``.
        address: of a running Ray cluster ("auto" finds it); None starts an embedded Ray.
        in_process: run everything in this process, without Ray.
        recompute: withdraw and compute again what depends on functions of yours that were edited since.

    Returns:
        The exit code: 0 done, 1 some runs failed, 130 interrupted.

    Raises:
        LossrayError: bad input; nothing was written.

    Example:
        The same command again finds all done, or what it lacks; with more seeds it adds these.

        >>> import flows, lossray, pathlib
        >>> _ = pathlib.Path("tiny.toml").write_text('''
        ...     name = "tiny"
        ...     data = {source = "gaussians", n = 40}
        ...     models = [{name = "linear"}]
        ...     optimizers = [{name = "sgd", lr = [0.1, 1.0]}]
        ...     training = {steps = 1, checkpoints = {steps = [0]}}
        ... ''')
        >>> flows.run("tiny.toml", "out/tiny", overrides=["seeds=1"], in_process=True)  # without Ray
        0
        >>> lossray.open_study("out/tiny").table("runs")[["optimizer", "lr", "status"]].values.tolist()
        [['sgd', 0.1, 'finished'], ['sgd', 1.0, 'finished']]
    """
    from flows.study import run_study  # keeps torch and ray out of `import flows`

    return run_study(
        str(study),
        str(out),
        overrides=overrides,
        address=address,
        in_process=in_process,
        recompute=recompute,
    )
