"""The RayJob: in KubeRay's own words and types, and whatever a run is called, or a value says, it stays one value."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from launcher.kuberay import NAME_LENGTH, Worker, manifest, name_of
from tests.kuberay_fields import FULL

FIELDS = yaml.safe_load((Path(__file__).parent / "kuberay_1_6_2.yaml").read_text())
TYPES = {"string": (str,), "integer": (int,), "boolean": (bool,), "object": (dict,), "int-or-string": (int, str)}
FREE = ("rayStartParams", "limits", "requests")
"""What users of the schema name as they like."""
WORKER = Worker("registry.example/leviathan:1", 8, 4, "64Gi", ("runs", "/runs"))
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
NASTY = st.one_of(
    st.text(min_size=1, max_size=80),
    st.sampled_from([
        "a: b", "- a", "{a}", "yes", "null", "1e3", "y", "0o17", "~", "a\nspec: {}", "a # b", "*a", "&a", "!!python/x",
        "$(touch pwned)", "`id`", "'", '"', "a;b", "${HOME}", "%s", "a\u2028b", "\x00",
    ]),
)  # fmt: skip


def fields(value, path=""):
    """Every field with a value of its own."""
    if isinstance(value, dict) and value and path != "metadata":
        free = path.split(".")[-1] in FREE
        for key, inner in value.items():
            yield from fields(inner, ".".join(filter(None, [path, "*" if free else key])))
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner, f"{path}[]")
    elif value != {}:
        yield path, value


def job(run="tiny", words=("python",), workers=(2, 4), worker=WORKER, version="2.60.0"):
    return yaml.safe_load(manifest(run, words, workers, worker, version))


def unlike_kuberay(tree):
    """Fields that KubeRay does not have, or has of another type."""
    wrong = []
    for path, value in fields(tree):
        kind = FIELDS.get(path, "none of its fields")
        fits = value in kind.split("|") if "|" in kind else isinstance(value, TYPES.get(kind, ()))
        if not fits or (isinstance(value, bool) and kind != "boolean"):
            wrong.append((path, kind))
    return wrong


def test_every_field_is_one_of_kuberays_and_of_its_type():
    tree = yaml.safe_load(FULL)
    assert unlike_kuberay(tree) == []
    assert {path for path, _ in fields(tree)} == set(FIELDS), "the list holds what is used, and no more"


@pytest.mark.parametrize(
    ("ours", "wrong", "path"),
    [
        ("entrypoint:", "entryPoint:", "spec.entryPoint"),
        ("backoffLimit: 0", "backoffLimit: yes", "spec.backoffLimit"),
        ("backoffLimit: 0", "backoffLimit: '0'", "spec.backoffLimit"),
        ("mode: token", "mode: tokens", "spec.rayClusterSpec.authOptions.mode"),
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: 1", "spec.shutdownAfterJobFinishes"),
    ],
)
def test_a_field_or_a_type_that_is_wrong_would_be_found(ours, wrong, path):
    assert ours in FULL
    assert [found for found, _ in unlike_kuberay(yaml.safe_load(FULL.replace(ours, wrong)))] == [path]


def test_the_driver_alone_decides_about_restarts_and_pods_go_when_it_is_done():
    spec = job()["spec"]
    assert (spec["backoffLimit"], spec["submissionMode"]) == (0, "HTTPMode")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_nobody_submits_without_a_token_and_pods_hold_no_key_of_the_cluster():
    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_ranks_have_what_a_worker_is_given_and_the_head_has_no_rank():
    cluster = job()["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 4, 4)
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert "nvidia.com/gpu" not in str(job(worker=Worker("i", 1, 0, "4Gi")))


def test_every_pod_sees_the_runs_and_has_shared_memory():
    cluster = job()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        places = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert places == {"shm": "/dev/shm", "runs": "/runs"}
        assert {volume["name"] for volume in spec["volumes"]} == set(places)
    alone = job(worker=Worker("i", 1, 0, "4Gi"))
    assert "persistentVolumeClaim" not in str(alone)


@settings(deadline=None)
@given(words=st.lists(NASTY, min_size=1, max_size=5))
def test_words_arrive_exactly_and_change_nothing_else(words):
    plain, nasty = job(), job(words=words)
    assert shlex.split(nasty["spec"].pop("entrypoint")) == words
    del plain["spec"]["entrypoint"]
    assert nasty == plain


@settings(deadline=None)
@given(image=st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=40))
def test_an_image_arrives_exactly_and_changes_nothing_else(image):
    tree = job(worker=Worker(image, 1, 0, "4Gi"))
    cluster = tree["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert [container.pop("image") for container in containers] == [image, image]
    plain = job(worker=Worker("i", 1, 0, "4Gi"))
    assert str(tree) == str(plain).replace("'image': 'i', ", "")


@pytest.mark.parametrize("claim", ["1e3", "0o17", "y", "12", "no"])
def test_text_that_other_readers_of_yaml_take_for_something_else_is_quoted(claim):
    text = manifest("tiny", ["python"], (1, 1), Worker("i", 1, 0, "4Gi", (claim, "/runs")), "2.60.0")
    assert re.search(rf"""claimName: (["']){claim}\1\n""", text)


@settings(deadline=None)
@given(run=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_any_runs_name_becomes_one_that_kubernetes_takes(run):
    name = name_of(run)
    assert LABEL.fullmatch(name)
    assert len(name) <= NAME_LENGTH


def test_no_two_runs_share_a_name():
    runs = [
        "a-b",
        "a_b",
        "a.b",
        "A-b",
        "a--b",
        "1",
        "run-1",
        "x" * 47,
        "x" * 48,
        "x" * 49,
        "x" * 46 + "-y",
        "7b",
        "run-7b",
    ]
    assert len({name_of(run) for run in runs}) == len(runs)
    assert name_of("my-1a2b3c4d") == "my-1a2b3c4d"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"workers": (3, 2)}, "3 to 2 workers"),
        ({"workers": (0, 2)}, "0 to 2 workers"),
        ({"version": "2.51.0"}, "no token for Ray '2.51.0'; build the image with 2.52 or newer"),
        ({"version": "nightly"}, "no token for Ray 'nightly'"),
        ({"worker": Worker("i", 0, 0, "4Gi")}, "0 cores"),
        ({"worker": Worker("i", 1, -1, "4Gi")}, "-1 GPUs"),
        ({"worker": Worker("i", 1, 0, "64GB")}, "memory '64GB' is no size of Kubernetes; write for example 64Gi"),
        ({"worker": Worker("i j", 1, 0, "4Gi")}, "'i j' is no name of an image"),
        ({"worker": Worker("", 1, 0, "4Gi")}, "'' is no name of an image"),
        ({"worker": Worker("i", 1, 0, "4Gi", ("Runs", "/runs"))}, "'Runs' is no PersistentVolumeClaim"),
        ({"worker": Worker("i", 1, 0, "4Gi", ("runs", "runs"))}, "'runs' is no place for a volume"),
        ({"worker": Worker("i", 1, 0, "4Gi", ("runs", "/a/../b"))}, "'/a/../b' is no place for a volume"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(changed, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        job(**changed)
