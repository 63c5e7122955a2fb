"""Publish one file per table from what tasks have committed."""

import ray

from lossray.storage.publish import publish_tables
from lossray.storage.store import Store
from tasks.worker import prepare_worker


@ray.remote(num_cpus=1, max_retries=3)
def gather(out: str) -> dict[str, int]:
    """Publish the tables of the store at ``out``; returns the rows of each."""
    prepare_worker(1)
    return publish_tables(Store(out))
