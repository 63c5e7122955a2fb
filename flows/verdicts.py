"""The claims of a study: computed from its tables once they are gathered, and printed by `lossray claims`."""

from typing import TYPE_CHECKING

import pyarrow as pa

from flows.notes import kept_notes
from lossray.findings.claims_text import CLAIMS_VERSION, claims_text
from lossray.results import StudyResults, open_study
from lossray.settings import content_hash
from lossray.storage.publish import derived_key, publish_derived, readable_tables, tables_source
from lossray.storage.rows import to_arrow
from lossray.storage.store import Store
from lossray.study import ClaimsSettings, Study

if TYPE_CHECKING:
    import pandas as pd


def publish_claims(store: Store, study: Study) -> None:
    """Write the table `claims` from the other tables, which have been gathered; nothing if it is current."""
    if claims_current(store, study):
        return
    key = _key(store, study)
    frame = _claims(StudyResults(store), study.claims)
    publish_derived(
        store, "claims", to_arrow("claims", pa.Table.from_pandas(frame, preserve_index=False)), key
    )


def claims_current(store: Store, study: Study) -> bool:
    """Whether the published claims are those of the published tables under the study's [claims]."""
    return derived_key(store, "claims") == _key(store, study)


def describe(out: str) -> str:
    """The verdicts with the numbers behind them, from what is committed so far; and what is missing, and why.

    Raises:
        StoreError: there is no store, or it is damaged.
    """
    results = open_study(out)
    store, study = results.store, results.study
    published = claims_current(store, study) and "claims" in readable_tables(store)
    text = claims_text(results.table("claims") if published else _claims(results, study.claims))
    notes = [f"  {note}" for note in kept_notes(store)]
    return "\n".join([text, "", "Not computed:", *notes]) if notes else text


def _claims(results: StudyResults, settings: ClaimsSettings) -> "pd.DataFrame":
    from lossray.findings.claims import TABLES_READ, claims_of  # here: they load the statistics

    return claims_of({name: results.table(name) for name in TABLES_READ}, settings)


def _key(store: Store, study: Study) -> str:
    return content_hash(
        {"claims": study.claims.plain(), "version": CLAIMS_VERSION, "tables": tables_source(store)}
    )
