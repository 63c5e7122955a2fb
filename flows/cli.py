"""The command line. Heavy imports are inside the commands: ``lossray --help`` loads neither torch nor ray."""

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from lossray import __version__
from lossray.errors import LossrayError, StudyError
from lossray.imports import uncollected

app = typer.Typer(
    name="lossray",
    help="The empirical geometry of neural-network loss surfaces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lossray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The empirical geometry of neural-network loss surfaces."""


STUDY = typer.Argument(help="A study file, or the name of a ready-made study (see `lossray studies`).")
OUT = typer.Argument(help="The store of a study: a folder or a URI.")


@app.command()
def run(
    study: Annotated[str, STUDY],
    out: Annotated[
        str | None, typer.Option(help="The store: a folder, or a URI such as s3://bucket/study.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. training.steps=200; may be repeated.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster; `auto` finds it. Default: embedded.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show packs, time and disk; do nothing.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No Ray: everything here, for a debugger.")
    ] = False,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Give the embedded Ray a dashboard.")
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Withdraw and compute again what depends on your edited functions."),
    ] = False,
) -> None:
    """Run a study, or resume it: what is committed is not computed again."""
    if dry_run:
        from flows.estimate import dry_run as describe

        typer.echo(describe(study, out, overrides=overrides or ()))
        return
    if out is None:
        raise StudyError("--out is missing: name the folder or URI that receives the tables")
    if in_process and address is not None:
        raise StudyError("found --address beside --in-process, which uses no Ray; allowed: one of them")
    with uncollected():
        from flows.study import run_study
        from flows.submission import version_note

    for line in version_note():
        typer.echo(f"note: {line}", err=True)
    code = run_study(
        study,
        out,
        overrides=overrides or (),
        address=address,
        in_process=in_process,
        dashboard=dashboard,
        recompute=recompute,
    )
    raise typer.Exit(code)


@app.command()
def submit(
    study: Annotated[str, STUDY],
    out: Annotated[
        str | None, typer.Option(help="The store: a URI such as s3://bucket/study, which all nodes see.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard, http://HEAD:8265; as RAY_API_SERVER_ADDRESS.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Leave once it is submitted; print its id.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. training.steps=200; may be repeated.")
    ] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="As for `lossray run`.")] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="The folder --out is one that all nodes share.")
    ] = False,
    driver_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs that the job's driver reserves; 0: it is on the head.")
    ] = None,
) -> None:
    """Run or resume a study as a job of a Ray cluster, and follow it; Ctrl-C leaves it running."""
    if out is None:
        raise StudyError("--out is missing: name the URI that receives the tables")
    with uncollected():
        from flows.submit import submit as submit_study

    code = submit_study(
        study,
        out,
        address=address,
        overrides=overrides or (),
        wait=not no_wait,
        recompute=recompute,
        shared=shared,
        driver_cpus=driver_cpus,
    )
    raise typer.Exit(code)


@app.command()
def status(
    out: Annotated[str, OUT],
    json: Annotated[bool, typer.Option("--json", help="As JSON: counts, rate, time left.")] = False,
) -> None:
    """What is done, running, waiting, failed."""
    from flows.status import as_json, describe

    typer.echo(as_json(out) if json else describe(out))


@app.command()
def tables(
    out: Annotated[str, OUT],
    table: Annotated[str | None, typer.Argument(help="Show the head of this table.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 10,
) -> None:
    """List the tables, or show the head of one."""
    from flows.listing import head, list_tables

    typer.echo(head(out, table, rows) if table else list_tables(out))


@app.command()
def claims(out: Annotated[str, OUT]) -> None:
    """The verdicts on the paper's claims, with the numbers behind them."""
    from flows.verdicts import describe

    typer.echo(describe(out))


@app.command()
def spectrum(
    model: Annotated[str, typer.Argument(help="How to build it: package.module:function.")],
    data: Annotated[
        str,
        typer.Argument(
            help="package.module:function returning (inputs, targets), a Parquet file, or digits."
        ),
    ],
    weights: Annotated[
        str | None, typer.Option(help="A safetensors file, or a state dict of torch.save.")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, mse, mse_mean, or package.module:function.")
    ] = "cross_entropy",
    top: Annotated[int, typer.Option(min=1, help="How many of the largest eigenvalues.")] = 10,
    examples: Annotated[
        int | None, typer.Option(min=1, help="A stratified part of the data. Default: all.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="A store for the tables: a folder or a URI.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the products: float32 or float64.")] = "float32",
    operator: Annotated[str, typer.Option(help="hessian, ggn or fisher.")] = "hessian",
) -> None:
    """The curvature spectrum of one's own model at one point."""
    from flows.spectrum import SpectrumRequest
    from flows.spectrum import spectrum as describe

    typer.echo(describe(SpectrumRequest(model, data, weights, loss, top, examples, dtype, operator), out))


@app.command()
def studies() -> None:
    """List the ready-made studies."""
    for path in sorted(resources.files("flows.studies").iterdir(), key=lambda entry: entry.name):
        if path.name.endswith(".toml"):
            first_line = path.read_text().splitlines()[0].lstrip("# ")
            typer.echo(f"{Path(path.name).stem:24} {first_line}")


def run_command() -> None:
    """Run the command line; every mistake of the user's is said in a line, with exit code 2.

    So is a full disk or a lost connection, with exit code 1.
    """
    try:
        app()
    except LossrayError as error:
        for line in str(error).splitlines():
            print(f"lossray: {line}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"lossray: {error}; what is committed stays: the same command resumes", file=sys.stderr)
        sys.exit(1)
