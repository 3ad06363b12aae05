import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptis.cluster import (
    MAX_DEVICES,
    Cluster,
    Device,
    Link,
    cluster_from_json,
    cluster_to_json,
    load_cluster,
    uniform,
)
from adaptis.errors import InputError
from adaptis.files import write_json

positive = st.floats(1e-6, 1e15)
links = st.builds(Link, st.floats(0, 10), positive | st.just(math.inf))
devices = st.builds(
    Device, st.floats(1e-3, 1e3), st.floats(0, 1e15) | st.just(math.inf), st.integers(0, 1000)
)
clusters = st.builds(Cluster, st.lists(devices, min_size=1, max_size=6).map(tuple), links, links)
MINIMAL = {"format": "adaptis-cluster", "version": 1, "devices": [{}]}


@given(cluster=clusters)
def test_a_cluster_survives_its_file(cluster):
    text = json.dumps(cluster_to_json(cluster), allow_nan=False)
    assert cluster_from_json(json.loads(text)) == cluster


def test_a_cluster_file_is_read(tmp_path):
    cluster = uniform(3, 2**30, Link(1e-5, 1e9))
    write_json(tmp_path / "cluster.json", cluster_to_json(cluster))
    assert load_cluster(tmp_path / "cluster.json") == cluster


def test_the_least_file_is_one_ideal_device():
    assert cluster_from_json(MINIMAL) == uniform(1)


def test_links_depend_on_the_nodes_of_both_ends():
    inside, between = Link(0.0, 2e9), Link(1e-3, 1e9)
    cluster = Cluster((Device(node=0), Device(node=0), Device(node=1)), inside, between)
    assert cluster.link(0, 1) is cluster.link(1, 0) is inside
    assert cluster.link(1, 2) is cluster.link(2, 0) is between


def test_a_transfer_takes_its_latency_and_its_bytes_over_the_bandwidth():
    assert Link(0.5, 100.0).seconds(200) == 2.5
    assert Link().seconds(1 << 60) == 0.0


@pytest.mark.parametrize("count", [0, -1, MAX_DEVICES + 1, 10**12])
def test_senseless_numbers_of_devices_are_refused(count):
    with pytest.raises(InputError, match=f"{count} devices: a number from 1 to {MAX_DEVICES}"):
        uniform(count)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"devices": []}, "0 devices, 1 to"),
        ({"devices": [{"speed": 0}]}, r"devices\[0\]: 'speed' is 0"),
        ({"devices": [{}, {"memory_bytes": -1}]}, r"devices\[1\]: 'memory_bytes' is -1"),
        ({"devices": [{"node": 1.5}]}, "'node' is a fraction"),
        ({"devices": [{"memory_gib": 1}]}, r"devices\[0\]: unknown key 'memory_gib'"),
        ({"devices": {}}, "'devices' is an object, a list is needed"),
        ({"within_node": {"bandwidth_bytes_per_second": 0}}, "within_node: 'bandwidth"),
        ({"within_node": {"latency": 0}}, "within_node: unknown key 'latency'"),
        ({"between_nodes": []}, "'between_nodes' is a list"),
        ({"version": 2}, "version 2 of adaptis-cluster is newer"),
        ({"format": "adaptis-plan"}, "the format is 'adaptis-plan'"),
        ({"nodes": 1}, "unknown key 'nodes'"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        cluster_from_json(MINIMAL | change, "here.json")
    assert str(caught.value).startswith("here.json: ")


def test_the_description_says_what_is_assumed():
    assert uniform(4).describe() == "4 equal devices, unlimited memory, free transfers"
    limited = uniform(2, 3 * 2**29, Link(0.0, 1e9))
    assert limited.describe() == "2 equal devices, 1.5 GiB each, priced transfers"
    uneven = Cluster((Device(1.0, 2**30), Device(2.0, 2**31)))
    assert uneven.describe() == "2 unequal devices, 1 to 2 GiB, free transfers"
