import json
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scale.data.loader import Loader
from ldm_scale.data.order import ALGORITHMS, Order, OrderPreset, Permutation, preset_order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 8))
    return Order(
        n=draw(st.integers(1, 3000)),
        seed=draw(st.integers(0, 2**40)),
        block=draw(st.integers(1, 40)),
        window=lanes * draw(st.integers(1, 8)),
        lanes=lanes,
    )


@given(orders())
def test_every_sample_comes_exactly_once_an_epoch(order):
    for epoch in (0, 1):
        positions = np.arange(epoch * order.n, (epoch + 1) * order.n)
        ids = order(positions)
        np.testing.assert_array_equal(np.sort(ids), np.arange(order.n))
        np.testing.assert_array_equal(order.inverse(ids, epoch), positions)


@given(orders(), st.integers(0, 10**13), st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_a_position_means_the_same_alone_and_in_any_company(order, start, offsets):
    positions = start + np.array(offsets)
    np.testing.assert_array_equal(order(positions), [order(np.array([p]))[0] for p in positions])


@dataclass
class Numbers:
    """A source whose samples are their own numbers: what the loader hands out is the order and nothing else."""

    order: Order

    def buffer(self, batch: int, *, pinned: bool) -> torch.Tensor:
        return torch.empty(batch, dtype=torch.int64)

    def announce(self, ids: np.ndarray) -> None:
        pass

    def read(self, positions: np.ndarray, *, ids: np.ndarray, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.from_numpy(ids))


def delivered(order: Order, *, start: int, batches: int, micro: int, accumulation: int, world: int) -> np.ndarray:
    """(batches, global batch) sample numbers as loaders of every rank give them, from `start`, each rank its column."""
    columns = []
    for rank in range(world):
        batch = micro * accumulation * world
        with Loader(Numbers(order), global_batch=batch, micro_batch=micro, rank=rank, world=world) as loader:
            stream = loader.batches(start)
            columns.append(np.stack([next(stream).numpy().copy() for _ in range(batches * accumulation)]))
    return np.stack([column.reshape(batches, -1) for column in columns], axis=-1).reshape(batches, -1)


@settings(max_examples=30, deadline=None)
@given(orders(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**12), st.integers(0, 3))
def test_every_world_delivers_the_same_global_batches_from_any_position(
    order, world, micro, accumulation, start, later
):
    """Over any number of epochs; a resume goes on where the batches before it stopped."""
    batch, shape = world * micro * accumulation, {"micro": micro, "accumulation": accumulation, "world": world}
    whole = delivered(order, start=start, batches=4, **shape)
    np.testing.assert_array_equal(whole.ravel(), order(np.arange(start, start + 4 * batch)))
    alone = delivered(order, start=start, batches=4, micro=batch, accumulation=1, world=1)
    np.testing.assert_array_equal(whole, alone)
    resumed = delivered(order, start=start + later * batch, batches=4 - later, **shape)
    np.testing.assert_array_equal(resumed, whole[later:])


@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_permutation_is_one_and_inverts(n, key):
    everything = np.arange(n)
    keys = np.full(n, key, np.uint64)
    image = Permutation(n)(everything, keys)
    np.testing.assert_array_equal(np.sort(image), everything)
    np.testing.assert_array_equal(Permutation(n).inverse(image, keys), everything)


@given(orders())
def test_samples_stay_in_the_windows_of_their_epoch(order):
    """A window reads whole blocks: at most `window` of them, of which the rotation may cut one in two."""
    parameters = order.state()["parameters"]
    span = parameters["window"] * parameters["block"]
    ids = Order(n=span * 3 + parameters["block"], seed=order.seed, **parameters)(np.arange(span))
    runs = np.count_nonzero(np.diff(np.sort(ids)) > 1) + 1
    assert runs <= parameters["window"] + 1


def test_rank_of_a_whole_window_reads_its_share_of_the_blocks():
    order = Order(n=64 * 64 * 10, seed=3, block=64, window=64, lanes=16)
    ids = order(np.arange(64 * 64))  # blocks are rotated: count runs of neighbours
    for world in (2, 4, 16):
        mine = np.sort(ids[1::world])
        assert np.count_nonzero(np.diff(mine) > 1) + 1 <= 64 // world


def test_neighbours_in_the_data_are_strangers_in_the_stream():
    ids = Order(n=100_000, seed=0, block=64, window=256, lanes=16)(np.arange(4096))
    assert np.mean(np.abs(np.diff(ids)) < 64) < 0.05
    assert len(np.unique(ids // 64)) > 200


def test_small_permutations_are_near_uniform():
    """All 24 orders of four samples, over 2,400 epochs: chi-square with 23 degrees of freedom, p = 1e-6 at 72."""
    order = Order(n=4, seed=1)
    epochs = order(np.arange(4 * 2400)).reshape(-1, 4)
    counts = np.unique(epochs @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 100.0) ** 2 / 100).sum() < 72


def test_seeds_and_epochs_differ():
    first = Order(n=1000, seed=0)(np.arange(2000))
    assert (first[:1000] == first[1000:]).mean() < 0.01
    assert (first[:1000] == Order(n=1000, seed=1)(np.arange(1000))).mean() < 0.01


@pytest.mark.parametrize("n", [1, 7])
def test_tiny_sets_work_with_the_presets(n):
    for preset in OrderPreset:
        ids = preset_order(preset, n=n, seed=0)(np.arange(5 * n))
        assert (np.sort(ids.reshape(5, n)) == np.arange(n)).all()


@pytest.mark.parametrize("preset", OrderPreset)
def test_batches_mix_shards_as_independent_draws_nearly_do(preset):
    """Design effect of whatever is constant in a shard: the variance of its batch mean against that of free draws."""
    order, batch = preset_order(preset, n=400_000_000, seed=0), 2048
    effects = []
    for start in (0, 7 * batch, 300_000_000 // batch * batch, 1000 * 400_000_000):
        counts = np.unique(order(np.arange(start, start + batch)) // 10_000, return_counts=True)[1]
        effects.append((counts**2).sum() / batch)
    assert max(effects) <= 1.6


FAR = [0, 1, 2, 262_144, 407_332_083, 407_332_084, 10**12]
GOLDEN = {
    OrderPreset.random_access: (
        {"block": 64, "window": 4096, "lanes": 256},
        [349111034, 96000731, 129819571, 253095523, 362423627, 95799898, 60758933],
        "02005280098d4b3b",
        "fbfc50e08ac2027e",
    ),
    OrderPreset.window: (
        {"block": 256, "window": 4096, "lanes": 256},
        [71307005, 208268936, 226735501, 314821536, 28353667, 349333370, 62461724],
        "3e886d9fd175cfdb",
        "8f9715129c35c2ad",
    ),
}
"""Parameters, samples at FAR of 407,332,084, and what the first 20,000 hash to, of as many and of 10,000."""


def test_golden_vectors_of_the_algorithm():
    """Pinned: a change here changes what every checkpoint's position means. Add an algorithm instead."""
    small = Order(n=20, seed=7, algorithm="feistel-window/1", block=3, window=4, lanes=2)
    assert small(np.arange(20)).tolist() == [
        13, 3, 2, 12, 4, 9, 10, 8, 11, 14, 15, 16, 0, 17, 19, 6, 18, 7, 5, 1,
    ]  # fmt: skip
    assert small(np.arange(20, 40)).tolist() == [
        10, 2, 8, 17, 12, 1, 11, 19, 9, 0, 13, 18, 7, 5, 6, 4, 15, 14, 16, 3,
    ]  # fmt: skip
    assert small.state() == {
        "algorithm": "feistel-window/1",
        "n": 20,
        "seed": 7,
        "parameters": {"block": 3, "window": 4, "lanes": 2},
    }


@pytest.mark.parametrize("preset", OrderPreset)
def test_golden_vectors_of_the_presets(preset):
    """Pinned like the algorithm: a run begun by a preset goes on with what the preset meant then."""
    parameters, samples, of_many, of_few = GOLDEN[preset]
    order = preset_order(preset, n=407_332_084, seed=1)
    assert order(np.array(FAR)).tolist() == samples
    for n, digest in ((407_332_084, of_many), (10_000, of_few)):
        ids = preset_order(preset, n=n, seed=1)(np.arange(20_000))
        assert sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest
    state = {"algorithm": "feistel-window/1", "n": 407_332_084, "seed": 1, "parameters": parameters}
    assert order.state() == state
    assert Order.from_state(state)(np.array(FAR)).tolist() == samples


def test_every_algorithm_of_a_checkpoint_is_still_known():
    """Grows; nothing is ever taken from it. One that is added brings its golden vectors."""
    assert list(ALGORITHMS) == ["feistel-window/1"]


def test_inverse_at_scale():
    order = Order(n=407_332_084, seed=5)
    positions = np.random.default_rng(0).integers(0, order.n, 5000) + 2 * order.n
    np.testing.assert_array_equal(order.inverse(order(positions), 2), positions)


def test_state_is_small_and_makes_the_same_order():
    order = Order(n=407_332_084, seed=12345, block=256, window=1024, lanes=64)
    text = json.dumps(order.state())
    assert len(text) < 200
    again = Order.from_state(json.loads(text))
    np.testing.assert_array_equal(again(np.arange(100)), order(np.arange(100)))
    order.require_same(json.loads(text))


def test_another_order_is_refused_with_both_sides():
    order = Order(n=100, seed=1)
    with pytest.raises(ValueError, match=r"was made by 'feistel-window/0'; this version knows 'feistel-window/1': "):
        Order.from_state(order.state() | {"algorithm": "feistel-window/0"})
    with pytest.raises(ValueError, match="n was 101, is now 100"):
        order.require_same(Order(n=101, seed=1).state())


@pytest.mark.parametrize("wrong", [{"n": 0}, {"block": 0}, {"lanes": 3}, {"window": 0}])
def test_impossible_orders_are_refused(wrong):
    with pytest.raises(ValueError, match="order"):
        Order(**({"n": 10, "seed": 0} | wrong))


def test_positions_and_ids_outside_are_refused():
    order = Order(n=10, seed=0)
    with pytest.raises(ValueError, match="start at 0"):
        order(np.array([-1]))
    with pytest.raises(ValueError, match=r"outside 0 \.\. 9"):
        order.inverse(np.array([10]), 0)
    assert order(np.array([], np.int64)).tolist() == []
