"""Reaching a cluster's job server: its address, a token where it asks for one, and a line for what fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_server
from types import SimpleNamespace

import pytest
import ray

from flows import job_server
from flows.job_server import JobServer, checked_address, connect
from lossray.errors import StudyError

TOKEN = "a" * 64
VERSION = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "s"}


class Dashboard(BaseHTTPRequestHandler):
    """Answers as a dashboard does that asks for a token, or does not."""

    token = None
    path_of_api = "/api/version"

    def do_GET(self):
        given = self.headers.get("Authorization")
        if self.path != self.path_of_api:
            self.answer(404, "404: Not Found")
        elif self.token is None or given == f"Bearer {self.token}":
            self.answer(200, json.dumps(VERSION))
        elif given is None:
            self.answer(401, "Unauthorized: Missing authentication token")
        else:
            self.answer(403, "Forbidden: Invalid authentication token")

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        """Nothing on the test's output."""


@pytest.fixture
def dashboard(monkeypatch, tmp_path):
    """``dashboard(token=..., path_of_api=...)``: its address; the user has no token of his own."""
    for name in (
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_API_SERVER_ADDRESS",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    servers = []

    def start(**attributes):
        handler = type("Handler", (Dashboard,), attributes)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refused(address):
    with pytest.raises(StudyError) as error:
        connect(address)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--address {address}: ")
    return str(error.value)


def test_no_token_is_sent_where_none_is_asked_for(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert connect(dashboard()).headers == {}


def test_the_token_of_the_environment_or_the_file_lets_us_in(dashboard, monkeypatch, tmp_path):
    address = dashboard(token=TOKEN)
    assert "found none" in refused(address)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert connect(address).headers == {"Authorization": f"Bearer {TOKEN}"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "found none" in refused(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    server = connect(address)
    assert server.headers == {"Authorization": f"Bearer {TOKEN}"}
    assert TOKEN not in repr(server)


def test_a_wrong_token_is_a_line_with_the_remedy(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    message = refused(dashboard(token=TOKEN))
    assert "Invalid authentication token" in message
    assert "RAY_AUTH_TOKEN" in message


def test_the_address_that_is_given_goes_before_the_environment(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    address = dashboard()
    assert connect(address).client.get_address() == address
    assert checked_address(None) == "http://127.0.0.1:9"


def test_what_is_no_dashboard_is_told_from_one(dashboard):
    assert "no dashboard of Ray's (HTTP 404)" in refused(dashboard(path_of_api="/none"))


def test_nobody_at_an_address_and_another_protocol_are_lines(dashboard):
    dashboard()  # for its environment
    with create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def greet():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"\x00\x00\x18\x04 not HTTP\r\n")

        threading.Thread(target=greet, daemon=True).start()
        assert "does not speak HTTP" in refused(address)
    assert "refused" in refused(address)


def test_a_server_that_says_nothing_is_not_waited_for(dashboard, monkeypatch):
    dashboard()
    monkeypatch.setattr(job_server, "CONNECT_SECONDS", 0.2)
    with create_server(("127.0.0.1", 0)) as listening:
        assert "no answer in 0.2 seconds" in refused(f"http://127.0.0.1:{listening.getsockname()[1]}")


@pytest.mark.parametrize(
    "address", ["http://head:8265", "https://head", "http://[::1]:8265/", "http://h/ray/"]
)
def test_addresses_of_dashboards_are_taken(address):
    assert checked_address(address) == address.rstrip("/")


@pytest.mark.parametrize(
    ("address", "nearest"),
    [
        ("head:6379", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("http://", "http://127.0.0.1:8265"),
        ("ftp://head/x", "http://head:8265"),
    ],
)
def test_other_addresses_are_refused_with_the_nearest_one(address, nearest):
    with pytest.raises(StudyError, match="no address of a dashboard") as refusal:
        checked_address(address)
    assert str(refusal.value).endswith(f"did you mean {nearest}?")


def test_no_address_at_all_is_asked_for(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(StudyError, match="--address is missing"):
        checked_address(None)


def test_commands_are_those_that_let_this_user_in(monkeypatch):
    plain, guarded = JobServer("http://h:1", None), JobServer("http://h:1", None, {"Authorization": "x"})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert plain.command("stop", "id") == "ray job stop --address http://h:1 id"
    assert guarded.command("stop", "id") == "RAY_AUTH_MODE=token ray job stop --address http://h:1 id"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert guarded.command("stop", "id") == plain.command("stop", "id")


def test_another_version_of_ray_is_noted():
    assert JobServer("", SimpleNamespace(_server_ray_version=ray.__version__)).notes() == []
    assert "2.1.0" in JobServer("", SimpleNamespace(_server_ray_version="2.1.0")).notes()[0]
