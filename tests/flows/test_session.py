"""What a study says where there is no cluster; no Ray is started, nor one used."""

import socket

import pytest
import ray

from flows.session import ray_session
from lossray.errors import StudyError


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """As if no Ray were initialised: other tests may have started the one that all tests share."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_where_no_cluster_is_found_the_address_is_named(monkeypatch, error):
    def refuse(address, **options):
        raise error("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(StudyError, match="--address auto: no Ray cluster answers there"):
        ray_session("auto", []).__enter__()


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(ray, "init", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free once the server is closed
    with pytest.raises(StudyError, match=f"--address 127.0.0.1:{port}: no Ray cluster answers there"):
        ray_session(f"127.0.0.1:{port}", []).__enter__()


def test_a_notebooks_ray_is_used_and_left_running(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the notebook's Ray was touched")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", refuse)
    with ray_session(None, []):
        pass
