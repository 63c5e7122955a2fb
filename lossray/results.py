"""A store as pandas tables, modules and data: `open_study`, for a study finished or still being written."""

import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lossray.errors import StoreError, StudyError
from lossray.names import nearest, unknown_name
from lossray.storage.publish import assemble, readable_tables
from lossray.storage.store import Store
from lossray.storage.tables import TABLES

# Who reads tables alone waits for neither torch nor the settings of studies: they are loaded where needed.
if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from lossray.study import Pack, Study
    from lossray.study.manifest import Manifest
    from lossray.training.datasets import Dataset

SPLITS = ("train", "validation", "test")


class StudyResults:
    """What a study has found so far. Tables and models are read anew at each access.

    Attributes:
        store: the folder or URI of the study, and the files in it.
    """

    def __init__(self, store: Store):
        self.store = store

    def __repr__(self) -> str:
        return f"StudyResults({self.store.url!r})"

    @property
    def tables(self) -> dict[str, int]:
        """The tables' names, with the number of rows committed so far."""
        published = readable_tables(self.store)
        return {
            name: published[name] if name in published else assemble(self.store, name).num_rows
            for name in TABLES
        }

    def table(self, name: str) -> "pd.DataFrame":
        """One table, sorted by its keys; empty while no task has committed rows of it.

        Columns, units and meanings: docs/tables.md. What is missing is NaN, None or NaT.

        Raises:
            StudyError: there is no such table.
            StoreError: the store is damaged.
        """
        if name not in TABLES:
            raise StudyError(f"no such table: {unknown_name(name, TABLES)}")
        if name in readable_tables(self.store):
            table = self.store.read_table(self.store.table_path(name), name)
        else:
            table = assemble(self.store, name)
        frame: pd.DataFrame = table.to_pandas()
        return frame

    @property
    def manifest(self) -> "Manifest":
        """What the store was made from: settings, packs, versions, host, arguments."""
        from lossray.study.manifest import Manifest

        return Manifest.from_plain(self.store.read_json("manifest.json"), f"{self.store.url}/manifest.json")

    @property
    def study(self) -> "Study":
        """The settings of the study, defaults filled in."""
        from lossray.study import study_from_table

        return study_from_table(self.manifest.study, f"{self.store.url}/manifest.json")

    def model(self, run_id: str, step: int) -> "nn.Module":
        """The model of a run with its weights at a checkpoint: on the CPU, the study's dtype, eval mode.

        Reads the data for their shape. Warns where the source of the user's model function is not what the
        study ran with: the weights are the checkpoint's, what is done with them is today's code.

        Raises:
            StudyError: there is no such run, or it has no checkpoint at that step.
            StoreError: the checkpoint is damaged.
            ModelError: the user's model function now makes another model.
            DataError: the data cannot be read, or have changed.
        """
        from lossray.restored import model_at

        pack, member = self._member(run_id)
        if not self.store.exists(self.store.checkpoint_path(pack.pack_id, step)):
            steps = self.store.checkpoint_steps(pack.pack_id)
            raise StudyError(f"run {run_id!r} has no checkpoint at step {step}; it has {steps}")
        dataset = self._dataset  # first: the user's folders are then on the path
        self._warn_of_edits(pack.model.name)
        return model_at(self.store, pack, member, step, dataset, self.study.training.dtype)

    def data(self, split: str = "train") -> tuple[Any, "Tensor"]:
        """Inputs and targets [N, ...] of a split, as the loss gets them; for "train" the analysis set's.

        The inputs are a tuple or dict of tensors where the data function gives such.

        Raises:
            StudyError: there is no such split.
            DataError: the data cannot be read, or have changed since the study ran.
        """
        if split not in SPLITS:
            raise StudyError(f"no such split: {unknown_name(split, SPLITS)}")
        if split == "train":
            from lossray.training.datasets import analysis_set

            examples = analysis_set(self._dataset, self.study.curvature.examples)
        else:
            examples = getattr(self._dataset, split)
        return examples.inputs, examples.targets

    @cached_property
    def _dataset(self) -> "Dataset":
        """The data of the study, read once; a data set never changes under a store."""
        from lossray.restored import study_data

        return study_data(self.study, self.manifest, self.store.url)

    def logits(self, ensemble_id: str, split: str = "test") -> NDArray[np.float32]:
        """The outputs of an ensemble's members on a split, [K, N, C]; rows in the order of `data(split)`.

        Members that diverged are left out.

        Raises:
            StudyError: there is no such ensemble, or none of its members has outputs on that split.
            StoreError: the store is damaged.
        """
        table = self.table("logits")
        entries = table[(table["ensemble_id"] == ensemble_id) & (table["split"] == split)].sort_values(
            "member"
        )
        if entries.empty:
            guess = nearest(ensemble_id, table["ensemble_id"].unique())
            hint = f"; did you mean {guess!r}?" if guess and guess != ensemble_id else ""
            raise StudyError(f"no logits of ensemble {ensemble_id!r} on split {split!r}{hint}")
        rows = [np.asarray(values, dtype=np.float32) for values in entries["logits"]]
        n_examples, n_outputs = entries[["n_examples", "n_outputs"]].iloc[0]
        return np.stack(rows).reshape(len(rows), int(n_examples), int(n_outputs))

    def _warn_of_edits(self, name: str) -> None:
        """Say it where a function of the user's is not the one that the study ran with."""
        from lossray.source_hash import is_imported

        expected = self.manifest.inputs.sources.get(name)
        if expected is not None and not is_imported(name, expected):
            warnings.warn(
                f"{name!r}: its source, or that of a module it imports, is not what the study ran with: the "
                "model has the checkpoint's weights in today's code",
                stacklevel=3,
            )

    def _member(self, run_id: str) -> tuple["Pack", int]:
        """The pack of a run, and the run's index in it."""
        packs = self.manifest.packs
        for pack in packs:
            if run_id in pack.run_ids:
                return pack, pack.run_ids.index(run_id)
        guess = nearest(run_id, [candidate for pack in packs for candidate in pack.run_ids])
        raise StudyError(f"the study has no run {run_id!r}" + (f"; did you mean {guess!r}?" if guess else ""))


def open_study(out: str | Path) -> StudyResults:
    """Open the store of a study, finished or still being written.

    Args:
        out: the store's path or URI, as given to `lossray run --out`.

    Raises:
        StoreError: there is no store.

    Example:
        What a table says can be seen again in the model that it speaks of.

        >>> import flows, lossray, pathlib, torch
        >>> _ = pathlib.Path("small.toml").write_text('''
        ...     name = "small"
        ...     data = {source = "gaussians", n = 40}
        ...     models = [{name = "linear"}]
        ...     optimizers = [{name = "sgd", lr = 0.1}]
        ...     training = {steps = 2, checkpoints = {steps = [0, 2]}}
        ... ''')
        >>> _ = flows.run("small.toml", "out/small", overrides=["seeds=1"], in_process=True)
        >>> study = lossray.open_study("out/small")
        >>> row = study.table("checkpoints").iloc[-1]
        >>> inputs, targets = study.data("train")
        >>> outputs = study.model(row["run_id"], row["step"])(inputs)
        >>> loss = torch.nn.functional.cross_entropy(outputs, targets).item()
        >>> bool(abs(loss - row["train_loss"]) < 1e-5)
        True
    """
    store = Store(str(out))
    try:
        there = store.exists("manifest.json") or bool(
            store.committed_keys()
        )  # `lossray spectrum` writes none
    except OSError as error:  # a file, or a folder that may not be read
        raise StoreError(f"{store.url} is no store of a study: {error.strerror or error}") from error
    if not there:
        raise StoreError(
            f"{store.url} is no store of a study: it has no manifest.json, which `lossray run` writes first"
        )
    return StudyResults(store)
