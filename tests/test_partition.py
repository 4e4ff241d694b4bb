"""Partition maps: the study's groups, strictness, and independence of present data."""

import dataclasses
import hashlib

import numpy as np
import pytest

from tiered.config import Config, DataConfig, PartitionConfig
from tiered.domains import CODES
from tiered.partition import make_partition_map
from tiered.store import UserError


def config(method: str, n: int, domains=CODES, seed: int = 0) -> Config:
    return Config(
        name="x",
        data=DataConfig(domains=tuple(domains)),
        partition=PartitionConfig(method=method, n=n, seed=seed),
    )


def test_language_groups_are_contiguous_in_the_order_of_the_study():
    members = make_partition_map(config("language", 4)).members
    assert members[0] == ("hi", "si", "gu", "pa")
    assert members[2] == ("ar", "fa", "ur", "kk")
    assert make_partition_map(config("language", 16)).members == tuple((c,) for c in CODES)


def test_family_groups_of_the_study():
    assert make_partition_map(config("family", 4)).members == (
        ("hi", "si", "gu", "pa"),
        ("ar", "fa", "ur", "kk"),
        ("zh", "vi", "ja", "ko"),
        ("it", "en", "de", "es"),
    )
    two = make_partition_map(config("family", 2)).members
    assert set(two[0]) == {"hi", "si", "gu", "pa", "ar", "fa", "ur", "kk"}
    eight = make_partition_map(config("family", 8)).members
    assert eight[0] == ("hi", "si") and eight[7] == ("de", "es")


@pytest.mark.parametrize("method", ["language", "family", "random_language"])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_every_domain_is_in_exactly_one_partition(method, n):
    members = make_partition_map(config(method, n)).members
    assert len(members) == n
    assert sorted(d for group in members for d in group) == sorted(CODES)
    assert {len(group) for group in members} == {16 // n}


def test_family_cannot_make_three():
    with pytest.raises(
        UserError, match=r"partition.n: method family cannot make 3 .*1, 2, 4, 8, 16"
    ):
        make_partition_map(config("family", 3))


def test_more_partitions_than_domains_is_refused():
    with pytest.raises(UserError, match=r"partition\.n: 5 partitions need at least 5 domains"):
        make_partition_map(config("language", 5, ("hi", "en")))


def test_map_does_not_depend_on_which_data_is_present():
    for method in ("language", "family", "random_language", "random"):
        with_all = config(method, 4)
        assert make_partition_map(with_all) == make_partition_map(with_all.without("hi"))


def test_random_assigns_each_document_by_its_own_id_alone():
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(4000)]
    table = make_partition_map(config("random", 4))
    assigned = table.assign("hi", ids)
    # deleting or reordering documents moves no other document
    assert np.array_equal(table.assign("hi", ids[::-7]), assigned[::-7])
    # uniform: 4000 documents over 4, standard deviation sqrt(4000 * 3/16) = 27
    assert np.all(np.abs(np.bincount(assigned, minlength=4) - 1000) < 5 * 27)
    other = make_partition_map(config("random", 4, seed=1)).assign("hi", ids)
    assert 0.6 < np.mean(other != assigned) < 0.9


def test_identity_of_a_language_partition_ignores_n_and_method():
    # the same single language trains the same model, however the map was made
    a = make_partition_map(config("language", 16)).identity(0)
    b = make_partition_map(config("family", 16)).identity(0)
    assert a == b == [["hi"], None]


def test_random_touches_every_partition():
    table = make_partition_map(config("random", 4))
    assert table.touched("hi") == (0, 1, 2, 3)
    assert make_partition_map(config("family", 4)).touched("de") == (3,)


def test_share_of_a_partition_comes_from_the_configuration():
    table = make_partition_map(dataclasses.replace(config("family", 4)).without("hi"))
    assert table.share(0) == 0.25
