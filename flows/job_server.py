"""The job server of a cluster, which its dashboard has; every failure to reach it in a line."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state.api import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException

from lossray.errors import StudyError

CONNECT_SECONDS = 5.0
NODES_SECONDS = 10.0  # a head that has just started lists none yet
DASHBOARD_PORT = 8265
DASHBOARD = re.compile(r"https?://([^\s/:\[\]@]+|\[[^\s\]]+\])(:\d+)?(/\S*)?", re.IGNORECASE)
TOKEN_FILE = "~/.ray/auth_token"
TOKEN_REMEDY = (
    f"remedy: the cluster's token in RAY_AUTH_TOKEN, or in the file {TOKEN_FILE} or RAY_AUTH_TOKEN_PATH"
)


@dataclass(frozen=True)
class JobServer:
    """A job server that has answered and lets us in.

    Attributes:
        address: of the dashboard.
        client: Ray's client of it.
        headers: of every request; they hold the token where the cluster asks for one.
    """

    address: str
    client: Any
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    def nodes(self) -> list[Any]:
        """The cluster's living nodes, as Ray's State API has them; none where it lists none in time."""
        with environment(RAY_API_SERVER_ADDRESS=self.address):
            state = StateApiClient(address=self.address, headers=dict(self.headers))
        deadline = time.monotonic() + NODES_SECONDS
        while True:
            nodes = self._list(state)
            if nodes or time.monotonic() > deadline:
                return [node for node in nodes if node.state == "ALIVE"]
            time.sleep(0.5)

    def command(self, verb: str, submission_id: str) -> str:
        """The `ray job` command that this user types for a job."""
        asks = bool(self.headers) and os.environ.get("RAY_AUTH_MODE") != "token"
        mode = "RAY_AUTH_MODE=token " if asks else ""
        return f"{mode}ray job {verb} --address {self.address} {submission_id}"

    def notes(self) -> list[str]:
        """A line where the cluster runs another Ray than this machine."""
        version = getattr(self.client, "_server_ray_version", None)
        if version in (None, ray.__version__):
            return []
        return [f"the cluster runs Ray {version}, this machine has {ray.__version__}"]

    def _list(self, state: StateApiClient) -> list[Any]:
        try:
            options = ListApiOptions(limit=10_000)
            return list(state.list(StateResource.NODES, options, raise_on_missing_output=False))
        except RayStateApiException:
            return []


def checked_address(address: str | None) -> str:
    """The address of a dashboard, without a slash at its end.

    Args:
        address: as given; None: that of RAY_API_SERVER_ADDRESS, as for `ray job`.

    Raises:
        StudyError: none, or the address of something else; the message has the nearest allowed one.
    """
    said = f"--address {address}"
    if address is None:
        address = os.environ.get("RAY_API_SERVER_ADDRESS", "")
        said = f"RAY_API_SERVER_ADDRESS={address}"
    if not address:
        raise StudyError(f"--address is missing: name the dashboard, such as http://HEAD:{DASHBOARD_PORT}")
    if DASHBOARD.fullmatch(address):
        return address.rstrip("/")
    rest = address.rpartition("://")[2]
    host = "127.0.0.1" if rest in ("auto", "local", "") else re.sub(r":\d*$", "", rest.split("/")[0])
    raise StudyError(
        f"{said}: found no address of a dashboard, which is what takes jobs; allowed: http://HOST:PORT or "
        f"https://HOST:PORT; did you mean http://{host}:{DASHBOARD_PORT}?"
    )


def connect(address: str) -> JobServer:
    """Reach the job server at a dashboard's address, with the user's token where the cluster asks for one.

    Raises:
        StudyError: nothing answers, or something else does, or the cluster does not accept the token.
    """
    headers = {"Authorization": f"Bearer {_token(address)}"} if _asks_for_token(address) else {}
    try:
        with environment(RAY_API_SERVER_ADDRESS=address):  # Ray prefers a variable to its argument
            client = JobSubmissionClient(address, headers=dict(headers))
    except AuthenticationError as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise StudyError(
            f"--address {address}: the cluster does not let us in ({reason}); {TOKEN_REMEDY}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise StudyError(f"--address {address}: no job server answers there ({error})") from error
    return JobServer(address, client, headers)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _asks_for_token(address: str) -> bool:
    """Whether the dashboard wants a token; asked without one, within a deadline, which Ray's client lacks."""
    try:
        answer = requests.get(f"{address}/api/version", timeout=CONNECT_SECONDS)
    except requests.RequestException as error:
        raise StudyError(
            f"--address {address}: no dashboard answers there ({_innermost(error)}); remedy: the one that "
            "`ray start --head` prints, reached from here, perhaps through `ssh -L` or `kubectl port-forward`"
        ) from error
    if answer.status_code == requests.codes.unauthorized:
        return True
    if answer.ok and "ray_version" in answer.text:
        return False
    raise StudyError(
        f"--address {address}: what answers there is no dashboard of Ray's (HTTP {answer.status_code}); "
        f"it has port {DASHBOARD_PORT} unless it was started with another one"
    )


def _token(address: str) -> str:
    """The token, from where Ray looks for it, in Ray's order."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE).expanduser()
    try:
        token = file.read_text().strip()
    except OSError:
        token = ""
    if not token:
        raise StudyError(f"--address {address}: the cluster asks for a token, found none; {TOKEN_REMEDY}")
    return token


def _innermost(error: BaseException) -> str:
    """What the operating system said, without the layers above it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, TimeoutError):
        return f"no answer in {CONNECT_SECONDS:g} seconds"
    if isinstance(error, HTTPException):  # which quotes bytes of another protocol
        return "what listens there does not speak HTTP"
    return " ".join(str(error).split()) or type(error).__name__
