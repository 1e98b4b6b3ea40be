"""The cluster launcher's files: accepted by Ray itself, and saying what their comments promise. Nothing is launched.

Offline: sockets are closed, AWS is moto's, whose list of instance types is a copy of AWS's own.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import socket
import subprocess
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayswift.planning.node_shapes import NODE_SHAPES

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "cluster.yaml": ("a100-8x80", "h100-8x80"),
    "clusters/gcp.yaml": ("a100-8x80-a2-ultra", "h100-8x80-a3-high"),
}
FILES = ["cluster.yaml", "clusters/gcp.yaml", "clusters/on-premises.yaml"]
CLOUDS = FILES[:2]
SHAPE = "rayswift.io/node-shape"
SPILL = "/mnt/nvme/ray-spill"
# What Ray is told by the driver on such a node.
PRODUCTS = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3"}
# Google's table of machine types: vCPUs and GPUs.
GCP_MACHINES = {
    "n2-standard-8": (8, 0), "c3-standard-44-lssd": (44, 0), "a2-ultragpu-8g": (96, 8), "a3-highgpu-8g": (208, 8),
}  # fmt: skip

Config = dict[str, Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)  # `ray up` is run here, and takes local paths from here


def load(name: str) -> Config:
    """The file as Ray prepares it: defaults filled in, commands merged, checked against its schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: Config = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(config)
    return config


def pools(config: Config) -> dict[str, Config]:
    """The worker types of a file, by name."""
    return {name: pool for name, pool in config["available_node_types"].items() if name != config["head_node_type"]}


def start_command(config: Config, kind: str) -> str:
    """The `ray start` line of the head or of a worker."""
    (line,) = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
    return str(line)


def run_options(config: Config, kind: str, pool: Config | None = None) -> list[str]:
    """What `docker run` gets, words split: Ray takes a pool's own list instead of the common worker list."""
    docker = {**config["docker"], **(pool or {}).get("docker", {})}
    return shlex.split(" ".join(docker["run_options"] + docker[f"{kind}_run_options"]))


def comment_commands(name: str) -> list[str]:
    """The shell commands that the head of a file tells to type, continued lines joined."""
    head = re.match(r"(?:#.*\n)+", (ROOT / name).read_text())
    assert head
    text = re.sub(r"\\\n# *", "", head[0])
    return [line.removeprefix("#   ").split("  #")[0].strip() for line in text.splitlines() if line.startswith("#   ")]


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    config = load(name)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", FILES)
def test_ray_refuses_a_misspelt_key(name: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / name).read_text().replace("idle_timeout_minutes:", "idle_timeout:"))
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        load(str(wrong))


@pytest.mark.parametrize("name", FILES)
def test_the_head_runs_no_work_and_hides_its_dashboard(name: str) -> None:
    config = load(name)
    command = start_command(config, "head")
    assert {"--head", "--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(command.split())
    assert "0.0.0.0" not in "\n".join(line.split("#")[0] for line in (ROOT / name).read_text().splitlines())
    if name in CLOUDS:
        head = config["available_node_types"]["head"]
        assert head["resources"] == {"CPU": 0, "GPU": 0}
        assert (head["min_workers"], head["max_workers"]) == (0, 0)


@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("name", FILES)
def test_ray_start_gets_options_it_knows_the_token_and_the_spill_folder(name: str, kind: str) -> None:
    import click
    from ray.scripts.scripts import start

    config = load(name)
    variable, *words = shlex.split(start_command(config, kind))
    assert (variable, words[:2]) == ("RAY_AUTH_MODE=token", ["ray", "start"])
    options, rest, _ = start.make_parser(click.Context(start)).parse_args(args=words[2:])  # raises for an unknown one
    assert not rest
    assert options["object_spilling_directory"] == SPILL
    assert any("mkdir" in line and SPILL in line for line in config["initialization_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config[f"{kind}_start_ray_commands"][0] == "ray stop"  # the launcher's own host, not this one


@pytest.mark.parametrize("name", FILES)
def test_containers_get_memory_limits_token_and_disk(name: str) -> None:
    config = load(name)
    boxes = [run_options(config, "head"), *(run_options(config, "worker", pool) for pool in pools(config).values())]
    boxes += [run_options(config, "worker")]
    for words in boxes:
        pairs = list(pairwise(words))
        assert {("--ulimit", "memlock=-1:-1"), ("--env", "RAY_AUTH_MODE=token")} <= set(pairs)
        assert ("--volume", "/mnt/nvme:/mnt/nvme") in pairs
        assert any(a == "--ulimit" and b.startswith("nofile=") and int(b.split(":")[1]) >= 65536 for a, b in pairs)
        (shm,) = [word for word in words if word.startswith("--shm-size")]  # a second one would win or lose by luck
        assert re.fullmatch(r"--shm-size=\d+g", shm)
    for pool in pools(config).values():
        words = run_options(config, "worker", pool)
        if pool["resources"].get("GPU") or name not in CLOUDS:
            assert "--gpus" in words
            assert "--shm-size=256g" in words


@pytest.mark.parametrize("name", FILES)
def test_image_and_versions_are_the_tested_ones(name: str) -> None:
    image = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-cpu", load(name)["docker"]["image"])
    assert image
    assert f"ray=={image[1]}\n" in (ROOT / "constraints.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    assert image[2] == "3"
    assert int(low) <= int(image[3]) < int(high)


@pytest.mark.parametrize("name", FILES)
def test_every_node_installs_this_checkout_with_its_constraints(name: str) -> None:
    config = load(name)
    sources = {local for remote, local in config["file_mounts"].items() if remote.startswith("~/rayswift-source/")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sources == {"rayswift", "serve", "pyproject.toml", "constraints.txt", project["readme"]}
    assert all((ROOT / local).exists() for local in sources)
    lists = [config["head_setup_commands"], config["worker_setup_commands"]]
    lists += [pool["worker_setup_commands"] for pool in pools(config).values() if "worker_setup_commands" in pool]
    for commands in lists:
        (install,) = [line for line in commands if "pip install" in line and "/tmp/rayswift-build[" in line]
        extra = re.search(r"rayswift-build\[(\w+)\]", install)
        assert extra
        assert extra[1] in project["optional-dependencies"]
        assert "--constraint /tmp/rayswift-build/constraints.txt" in install


@pytest.mark.parametrize("name", CLOUDS)
def test_pools_are_named_by_shape_and_bounded(name: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
    from ray._private.label_utils import validate_node_label_syntax

    config = load(name)
    assert set(pools(config)) == {"data", *SHAPES[name], *(f"{shape}-spot" for shape in SHAPES[name])}
    assert all(shape in NODE_SHAPES for shape in SHAPES[name])  # the network of this machine type, not of another
    for pool_name, pool in config["available_node_types"].items():
        validate_node_label_syntax(pool["labels"])
        shape = pool_name.removesuffix("-spot")
        assert pool["labels"][SHAPE] == shape
        assert pool["min_workers"] == 0  # a GPU node nobody asked for is the dearest of mistakes
        if pool_name != "head":
            assert 0 < pool["max_workers"] <= config["max_workers"]
        family, _, size = shape.partition("-")
        if size:
            assert pool["resources"]["GPU"] == int(size.split("x")[0])
            found = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(PRODUCTS[family])
            assert pool["labels"]["ray.io/accelerator-type"] == found
        else:
            assert pool["resources"]["GPU"] == 0
            assert "ray.io/accelerator-type" not in pool["labels"]
    assert 0 < config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
def test_a_spot_pool_differs_in_the_market_only(name: str, shape: str) -> None:
    plain, spot = (copy.deepcopy(pools(load(name))[shape + suffix]) for suffix in ("", "-spot"))
    assert plain["labels"].pop("ray.io/market-type") == "on-demand"
    assert spot["labels"].pop("ray.io/market-type") == "spot"
    if name == "cluster.yaml":
        assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    else:
        assert "provisioningModel" not in plain["node_config"].pop("scheduling")
        assert spot["node_config"].pop("scheduling")["provisioningModel"] == "SPOT"
    assert plain.pop("max_workers") >= spot.pop("max_workers")
    assert plain == spot


def test_google_machines_have_what_the_pools_promise() -> None:
    for pool in load("clusters/gcp.yaml")["available_node_types"].values():
        node = pool["node_config"]
        cpus, gpus = GCP_MACHINES[node["machineType"]]
        if pool["labels"][SHAPE] != "head":
            assert pool["resources"] == {"CPU": cpus, "GPU": gpus}
        assert all("accessConfigs" not in interface for interface in node["networkInterfaces"])  # no public address
        assert (gpus > 0) == (node.get("scheduling", {}).get("onHostMaintenance") == "TERMINATE")
        assert (gpus > 0) == ("resourcePolicies" in node)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An AWS account of moto's with what the comments of cluster.yaml tell to make; yields the file with its ids."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a new SSH key to ~/.ssh
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    from ray.autoscaler._private.aws import utils

    with mock_aws():
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        ec2, iam = boto3.resource("ec2", "us-west-2"), boto3.client("iam", "us-west-2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        vpc.create_subnet(CidrBlock="10.0.16.0/20", AvailabilityZone="us-west-2b")  # Ray would take the first it finds
        subnet = vpc.create_subnet(CidrBlock="10.0.0.0/20", AvailabilityZone="us-west-2b")
        group = vpc.create_security_group(GroupName="rayswift", Description="nodes of one cluster")
        group.authorize_ingress(IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}])
        iam.create_instance_profile(InstanceProfileName="rayswift-node")
        image = next(iter(ec2.images.filter(Owners=["amazon"]))).id
        text = (ROOT / "cluster.yaml").read_text()
        ids = {"subnet-" + "0" * 17: subnet.id, "sg-" + "0" * 17: group.id, "ami-" + "0" * 17: image}
        for placeholder, real in ids.items():
            assert text.count(placeholder) == 1, f"{placeholder} stands in more than one place"
            text = text.replace(placeholder, real)
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        yield path, subnet.id, group.id
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()


def test_aws_instances_have_what_the_pools_promise(account: Any) -> None:
    import boto3

    config = load(str(account[0]))
    types = [pool["node_config"]["InstanceType"] for pool in config["available_node_types"].values()]
    client = boto3.client("ec2", "us-west-2")
    facts = {
        fact["InstanceType"]: fact
        for fact in client.describe_instance_types(InstanceTypes=sorted(set(types)))["InstanceTypes"]
    }
    for name, pool in config["available_node_types"].items():
        node = pool["node_config"]
        fact = facts[node["InstanceType"]]
        gpus = fact.get("GpuInfo", {}).get("Gpus", [{"Count": 0, "Name": "", "MemoryInfo": {"SizeInMiB": 0}}])[0]
        shape = pool["labels"][SHAPE]
        if shape != "head":
            assert pool["resources"] == {"CPU": fact["VCpuInfo"]["DefaultVCpus"], "GPU": gpus["Count"]}
            assert fact["InstanceStorageInfo"]["Disks"][0]["Type"] == "ssd"  # there is something to stripe
        market = node.get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        assert market in fact["SupportedUsageClasses"]
        interfaces = node.get("NetworkInterfaces", [])
        assert len(interfaces) == (fact["NetworkInfo"].get("EfaInfo") or {}).get("MaximumEfaInterfaces", 0)
        if not interfaces:
            continue
        assert shape == f"{gpus['Name'].lower()}-{gpus['Count']}x{gpus['MemoryInfo']['SizeInMiB'] // 1024}", name
        assert [one["NetworkCardIndex"] for one in interfaces] == list(range(len(interfaces)))
        assert [one["DeviceIndex"] for one in interfaces] == [0, *[1] * (len(interfaces) - 1)]
        assert [one["InterfaceType"] for one in interfaces] == ["efa", *["efa-only"] * (len(interfaces) - 1)]
        assert node["Placement"]["GroupName"]
        words = run_options(config, "worker", pool)
        assert {"--device=/dev/infiniband", "FI_PROVIDER=efa"} <= set(words)
        assert any("efa_installer.sh" in line for line in pool["worker_setup_commands"])


def test_rays_own_bootstrap_and_launch_accept_the_aws_file(account: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray fills the file in and asks for a node of each pool; botocore checks every request against AWS's own model."""
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    path, subnet, group = account
    config = load(str(path))
    wanted = copy.deepcopy({name: pool["resources"] for name, pool in pools(config).items()})
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    for name, pool in pools(config).items():
        assert {key: pool["resources"][key] for key in ("CPU", "GPU")} == wanted[name]
    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, pool in config["available_node_types"].items():
        provider.create_node(pool["node_config"], {"ray-user-node-type": name, "ray-node-name": name}, 1)
    ec2 = boto3.resource("ec2", "us-west-2")
    nodes = {
        tag["Value"]: node for node in ec2.instances.all() for tag in node.tags if tag["Key"] == "ray-user-node-type"
    }
    assert set(nodes) == set(config["available_node_types"])
    for node in nodes.values():
        assert node.subnet_id == subnet
        assert {one["GroupId"] for card in node.network_interfaces for one in card.groups} == {group}
        assert not node.public_ip_address
    opened = [
        permission
        for one in ec2.security_groups.all()
        for permission in one.ip_permissions
        if any(block["CidrIp"] == "0.0.0.0/0" for block in permission.get("IpRanges", []))
    ]
    assert not opened


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], str]]:
    """Runs commands of a file on a make-believe host: programs that are named print what they are told, and `sudo` only
    notes what it was asked for."""
    log, labels = tmp_path / "sudo.log", tmp_path / "labels.yaml"

    def run(commands: list[str], **prints: str | None) -> tuple[subprocess.CompletedProcess[str], str]:
        programs = tmp_path / "bin"
        programs.mkdir()
        sudo = f'echo "$@" >> {shlex.quote(str(log))}\n[ "$1" != tee ] || cat > {shlex.quote(str(labels))}\n'
        scripts = {"sudo": sudo}
        for name, text in prints.items():
            body = "exit 1\n" if text is None else f"cat <<'END'\n{text}END\n"
            scripts[name.replace("_", "-")] = body
        for name, body in scripts.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}")
            (programs / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", "\n".join(f"( {line}\n) || exit 1" for line in commands)],
            capture_output=True, text=True, env=environment, timeout=30, check=False,
        )  # fmt: skip
        return done, labels.read_text() if labels.exists() else log.read_text()

    return run


def disks(model: str, count: int, root: str) -> str:
    return f"/dev/nvme0n1 {root}\n" + "".join(f"/dev/nvme{n}n1 {model}\n" for n in range(1, count + 1))


@pytest.mark.parametrize("count", [0, 1, 8, 16])
@pytest.mark.parametrize(
    ("name", "model", "root"),
    [
        ("cluster.yaml", "Amazon EC2 NVMe Instance Storage", "Amazon Elastic Block Store"),
        ("clusters/gcp.yaml", "nvme_card", "nvme_card-pd"),
    ],
)
def test_the_nvme_disks_become_one_stripe(name: str, model: str, root: str, count: int, machine: Any) -> None:
    done, asked = machine(load(name)["initialization_commands"], mountpoint=None, lsblk=disks(model, count, root))
    assert done.returncode == 0, done.stderr
    assert f"chmod 1777 {SPILL}" in asked
    made = [line for line in asked.splitlines() if line.startswith("mdadm")]
    assert len(made) == (count > 0)
    if made:
        assert f"--level=0 --raid-devices={count} /dev/nvme1n1" in made[0]
        assert "/dev/nvme0n1" not in made[0]  # the root disk
        assert re.search(r"^mount .*/dev/md0 /mnt/nvme$", asked, re.MULTILINE)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_mounted_stripe_is_left_alone(name: str, machine: Any) -> None:
    done, asked = machine(load(name)["initialization_commands"], mountpoint="", lsblk="")
    assert done.returncode == 0, done.stderr
    assert "mdadm" not in asked


@pytest.mark.parametrize(
    ("product", "count", "shape"),
    [
        (PRODUCTS["a100"], 8, "a100-8x80"), (PRODUCTS["h100"], 8, "h100-8x80"), (PRODUCTS["h100"], 4, "h100-4x80"),
        ("NVIDIA A100-SXM4-40GB", 8, "other"), (None, 0, "data"),
    ],
)  # fmt: skip
def test_a_machine_works_out_its_own_label(
    product: str | None, count: int, shape: str, machine: Any, tmp_path: Path
) -> None:
    from ray._private.label_utils import parse_node_labels_from_yaml_file

    commands = load("clusters/on-premises.yaml")["initialization_commands"]
    done, _ = machine(commands, nvidia_smi=None if product is None else f"{product}\n" * count)
    assert done.returncode == 0, done.stderr
    assert parse_node_labels_from_yaml_file(str(tmp_path / "labels.yaml")) == {SHAPE: shape}


def test_machines_of_a_list_all_belong_to_the_cluster() -> None:
    config = load("clusters/on-premises.yaml")
    (node,) = config["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
    assert "--labels-file=/etc/rayswift/labels.yaml" in start_command(config, "worker")
    assert "/etc/rayswift:/etc/rayswift:ro" in run_options(config, "worker")


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_shell(name: str) -> None:
    config = load(name)
    kinds = ("initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    lines = [line for kind in kinds for line in config[f"{kind}_commands"]]
    lines += [line for pool in pools(config).values() for line in pool.get("worker_setup_commands", [])]
    for line in lines:
        checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", FILES)
def test_the_commands_in_the_comments_exist(name: str) -> None:
    from ray.scripts.scripts import cli
    from typer.main import get_command

    from rayswift.cli import app

    told = comment_commands(name)
    assert {f"ray {verb} {name}" for verb in ("up", "dashboard", "down")} <= set(told)
    assert told.index("umask 077") < told.index("ray get-auth-token --generate"), "Ray would let everybody read it"
    for command in told:
        program, verb, *words = shlex.split(command)
        assert program in ("ray", "rayswift", "pip", "export", "umask"), command
        if program == "ray":
            assert verb in cli.commands
            assert all(word == name for word in words if word.endswith("cluster.yaml") or word.startswith("clusters/"))
        elif program == "rayswift":
            assert verb in get_command(app).commands  # type: ignore[attr-defined]
        for word in words:
            key, dot, _ = word.partition(".")
            if dot and "=" in word and key in ("cluster", "train"):
                assert word.split("=")[0] in ("cluster.device", "cluster.workers")


def test_the_request_in_the_comments_asks_for_a_pool_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program after `python -c` is run with Ray's own functions watched."""
    import ray
    from ray.autoscaler import sdk

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda: None)
    monkeypatch.setattr(sdk, "request_resources", lambda **request: asked.append(request))
    for command in comment_commands("cluster.yaml"):
        if "request_resources" in command:
            *_, python, option, program = shlex.split(command)
            assert (python, option) == ("python", "-c")
            exec(program, {})
    first, last = asked
    assert last == {"bundles": []}
    assert len(first["bundles"]) == len(first["bundle_label_selectors"]) == 2
    shapes = {pool["labels"][SHAPE]: pool["resources"] for pool in pools(load("cluster.yaml")).values()}
    for bundle, selector in zip(first["bundles"], first["bundle_label_selectors"], strict=True):
        assert bundle["GPU"] == shapes[selector[SHAPE]]["GPU"]


@pytest.mark.parametrize("name", FILES)
def test_the_file_names_no_machine_and_no_secret(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"/(root|home|work)/|pypi|AKIA|BEGIN [A-Z ]*PRIVATE", text)
    for address in re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text):
        assert address in ("127.0.0.1", "0.0.0.0", "35.235.240.0") or address.startswith("192.0.2."), address
    assert all(len(line) <= 120 for line in text.splitlines())
