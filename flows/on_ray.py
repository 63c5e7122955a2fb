"""What a study takes from Ray beside its driver; imported only where it runs on Ray, which may be missing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayTaskError

from flows.capacity import Shares, capacity, require_fits, shares_of
from flows.driver import WAIT_SECONDS
from flows.interrupt import Interrupt
from flows.session import has_gpus, is_embedded, ray_session
from lossray.storage.store import Store
from lossray.study import Resources
from tasks.ray_tasks import gather


@contextmanager
def join(
    address: str | None, user_folders: Sequence[str], resources: Resources, *, dashboard: bool
) -> Iterator[tuple[Shares, bool]]:
    """`ray_session`, with what the study's tasks take of it, and whether it has GPUs.

    Raises:
        StudyError: no Ray at ``address``, or a task asks for more than a Ray has that does not grow.
    """
    with ray_session(address, user_folders, dashboard=dashboard):
        gpus = has_gpus()
        shares = shares_of(resources, gpus=gpus)
        if is_embedded() or not resources.wait:
            require_fits(capacity(shares))
        yield shares, gpus


def gather_tables(store: Store, interrupt: Interrupt) -> bool:
    """Publish the tables in a task; False after an interrupt.

    Raises:
        StoreError: a part is missing or damaged.
    """
    reference = gather.options(name="gather").remote(store.url)
    while not ray.wait([reference], timeout=WAIT_SECONDS)[0]:
        if interrupt.received:
            return False
    try:
        ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None  # the user's message, without the worker's traceback
    return True
