"""A failure here means: `longnet-dist doctor --cluster` misses a problem of a cluster, or reports one that is none."""

from __future__ import annotations

import itertools

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "longnet-dist": "0.1.0"}
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")


def reports(**changes):
    """Reports of four nodes that are alike, but for the changes of the second."""
    from longnet_dist.integrations.ray.diagnosis import NodeReport

    fields = [{"address": address, "versions": VERSIONS, "clock_offset": 0.002} for address in ADDRESSES]
    fields[1] |= changes
    return [NodeReport(**node) for node in fields]


def links(changes=None):
    """Links of 10 GB/s between the four nodes, but for the changes."""
    from longnet_dist.integrations.ray.diagnosis import Link

    speeds = dict.fromkeys(itertools.combinations(ADDRESSES, 2), 10e9) | (changes or {})
    return {pair: speed if isinstance(speed, str) else Link(1e-4, speed) for pair, speed in speeds.items()}


@pytest.mark.parametrize("count", range(10))
def test_every_two_nodes_meet_once_and_a_node_is_in_one_pair_at_a_time(count):
    """The number of rounds is the smallest possible."""
    from longnet_dist.integrations.ray.diagnosis import disjoint_pairs

    rounds = list(disjoint_pairs(count))
    assert all(len({*itertools.chain(*pairs)}) == 2 * len(pairs) for pairs in rounds)
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(range(count), 2))
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)


def test_nodes_and_links_that_are_alike_are_no_problem():
    from longnet_dist.integrations.ray.diagnosis import find_problems

    assert find_problems(reports(), links()) == []
    assert find_problems(reports(clock_offset=-0.9), links({ADDRESSES[:2]: 3.4e9})) == []
    assert find_problems([], {}) == []


@pytest.mark.parametrize(
    ("nodes", "changed_links", "problem"),
    [
        ({"clock_offset": -1.2}, {}, "the clock of node 10.0.0.2 is -1.2 s off: run NTP"),
        ({"clock_offset": 3600.0}, {}, "the clock of node 10.0.0.2 is +3600.0 s off: run NTP"),
        (
            {"versions": VERSIONS | {"torch": "2.12.1"}},
            {},
            "nodes have different versions of torch: 2.13.0 on 10.0.0.1, 10.0.0.3, 10.0.0.4; 2.12.1 on 10.0.0.2",
        ),
        (
            {"versions": VERSIONS | {"longnet-dist": "0.0.9"}},
            {},
            "nodes have different versions of longnet-dist: 0.1.0 on 10.0.0.1, 10.0.0.3, 10.0.0.4; 0.0.9 on 10.0.0.2",
        ),
        (
            {"versions": {}, "clock_offset": None, "failure": "no answer within 30 s"},
            {},
            "node 10.0.0.2: no answer within 30 s",
        ),
        ({}, {ADDRESSES[1:3]: "they do not reach each other"}, "10.0.0.2 and 10.0.0.3: they do not reach each other"),
        ({}, {ADDRESSES[1:3]: 3.3e9}, "10.0.0.2 and 10.0.0.3 exchange 3.30 GB/s, and the median is 10.00"),
    ],
)
def test_a_node_or_link_that_differs_is_a_problem(nodes, changed_links, problem):
    from longnet_dist.integrations.ray.diagnosis import find_problems

    assert find_problems(reports(**nodes), links(changed_links)) == [problem]


def test_a_slow_link_is_told_among_three_or_more():
    from longnet_dist.integrations.ray.diagnosis import find_problems

    two = dict(itertools.islice(links({ADDRESSES[:2]: 1e6}).items(), 2))
    assert find_problems(reports(), two) == []
    broken = dict.fromkeys(itertools.islice(itertools.combinations(ADDRESSES, 2), 4), "unreachable")
    assert len(find_problems(reports(), links(broken))) == 4
