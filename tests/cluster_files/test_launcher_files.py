"""cluster/local.yaml and cluster/aws.yaml as `ray up` reads them: Ray's own schema and preparation."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    name: yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text()) for name in ("local", "aws")
}


def prepared(config):
    """The configuration with Ray's defaults, checked; a private API of Ray, whose version has a bound."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(config, json.loads(schema.read_text()))
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_file(name):
    config = prepared(LAUNCHERS[name])
    assert config["cluster_name"] == "lossray"
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nothing_is_installed_on_the_way(name):
    """Ray's defaults for AWS would put a Ray of another version into the container."""
    config = prepared(LAUNCHERS[name])
    setup = [config[f"{kind}setup_commands"] for kind in ("", "head_", "worker_")]
    assert [config["initialization_commands"], *setup] == [[], [], [], []]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_node_has_the_token_and_asks_for_it(name):
    config = prepared(LAUNCHERS[name])
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_find_the_head(name):
    config = prepared(LAUNCHERS[name])
    head, worker = (config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "ray start --head --" in head
    assert "--port=6379" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "ray start --address=$RAY_HEAD_IP:6379" in worker


def test_the_machines_of_ones_own_are_all_used():
    config = prepared(LAUNCHERS["local"])
    (nodes,) = config["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == len(config["provider"]["worker_ips"]) == 2
    start = config["head_start_ray_commands"][-1]
    assert start.startswith("export RAY_enable_autoscaler_v2=0;")  # after Ray's own export of 1


def test_on_aws_the_head_does_no_work_and_the_workers_are_spot_from_none():
    config = prepared(LAUNCHERS["aws"])
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert " --num-cpus=0 " in config["head_start_ray_commands"][-1]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert set(types) == {"cpu", "gpu"}
    assert types["gpu"]["docker"] == {"worker_run_options": ["--env NVIDIA_VISIBLE_DEVICES=all"]}
    for worker in types.values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["node_config"]["IamInstanceProfile"] == {"Name": "lossray-worker"}
        assert worker["node_config"]["ImageId"] == head["node_config"]["ImageId"]


def without(config, *keys):
    """The configuration without one entry, however deep."""
    config = copy.deepcopy(config)
    entry = config
    for key in keys[:-1]:
        entry = entry[key]
    del entry[keys[-1]]
    return config


@pytest.mark.parametrize(
    ("mistaken", "error"),
    [
        (LAUNCHERS["aws"] | {"max_worker": 3}, "max_worker"),
        (LAUNCHERS["aws"] | {"max_workers": "3"}, "not of type 'integer'"),
        (LAUNCHERS["aws"] | {"head_node_type": "heads"}, "head_node_type"),
        (without(LAUNCHERS["aws"], "available_node_types", "gpu", "resources"), "resources"),
        (without(LAUNCHERS["local"], "docker", "container_name"), "container"),
        (without(LAUNCHERS["local"], "provider", "type"), "type"),
    ],
)
def test_mistakes_are_noticed(mistaken, error):
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError), match=error):
        prepared(mistaken)
