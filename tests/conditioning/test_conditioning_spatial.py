"""Maps and images in, channels out; the empty condition of any size; refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ldm_scale.conditioning.spatial import ConcatConditioner, ConcatConfig, LabelMapConditioner, LabelMapConfig


def concat() -> ConcatConditioner:
    return ConcatConfig(channels=4).build()


def label_map(**changes: Any) -> LabelMapConditioner:
    torch.manual_seed(0)
    return LabelMapConfig(**({"classes": 6, "channels": 3, "halvings": 2} | changes)).build()


def test_channels_pass_through():
    conditioner, images = concat(), [torch.randn(4, 3, 5) for _ in range(2)]
    assert (conditioner.context_dim, conditioner.concat_channels, conditioner.vector_dim) == (0, 4, 0)
    inputs = conditioner.prepare(images)
    conditions = conditioner(inputs)
    assert torch.equal(conditions.concat, torch.stack(images))
    assert (conditions.context, conditions.vector) == (None, None)
    dropped = conditioner.dropped(inputs, torch.tensor([True, False]))
    assert torch.equal(dropped, torch.stack((torch.zeros(4, 3, 5), images[1])))
    assert conditioner.null_inputs(3).shape == (3, 4, 1, 1)
    assert not conditioner.null_inputs(3).any()
    assert list(conditioner.parameters()) == []


def test_channels_that_do_not_fit_are_refused():
    for shape in ((3, 4, 4), (4, 4), (1, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"^condition of shape .*conditioning\.channels=4"):
            concat().prepare([torch.zeros(shape)])
    with pytest.raises(ValueError, match=r"differ in size: \(4, 4, 4\), \(4, 5, 4\)"):
        concat().prepare([torch.zeros(4, 4, 4), torch.zeros(4, 5, 4)])


def test_label_maps_have_the_published_size():
    conditioner = LabelMapConfig().build()
    assert {name: tuple(p.shape) for name, p in conditioner.state_dict().items()} == {
        "channel_mapper.weight": (3, 182, 1, 1)
    }
    assert sum(p.numel() for p in conditioner.parameters()) == 546


def test_labels_are_halved_as_one_hot_maps_and_projected():
    """The paper's order, one-hot then halving then projecting, in values and in gradients."""
    conditioner = label_map()
    maps = np.random.default_rng(0).integers(-1, 6, size=(2, 8, 12))
    got = conditioner(conditioner.prepare(list(maps))).concat
    one_hot = functional.one_hot(torch.from_numpy(maps) + 1, 7)[..., 1:].movedim(-1, 1).float()
    for _ in range(2):
        one_hot = functional.interpolate(one_hot, scale_factor=0.5, mode="bilinear")
    weight = conditioner.channel_mapper.weight.detach().clone().requires_grad_()
    want = functional.conv2d(one_hot, weight)
    assert got.shape == (2, conditioner.concat_channels, 2, 3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    ahead = torch.randn(got.shape)
    (got * ahead).sum().backward()
    (want * ahead).sum().backward()
    torch.testing.assert_close(conditioner.channel_mapper.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_no_label_gives_zeros_of_any_size():
    conditioner = label_map()
    assert torch.equal(conditioner(conditioner.null_inputs(2)).concat, torch.zeros(2, 3, 1, 1))
    inputs = conditioner.prepare([torch.full((8, 4), 5)] * 2)
    dropped = conditioner(conditioner.dropped(inputs, torch.tensor([False, True]))).concat
    assert torch.equal(dropped[1], torch.zeros(3, 2, 1))
    assert torch.equal(dropped[0], conditioner(inputs).concat[0])
    assert dropped[0].abs().min() > 0


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.full((4, 4), 6), r"labels 6 to 6; must be 0 to 5, or -1"),
        (torch.full((4, 4), -2), r"labels -2 to -2; must be 0 to 5, or -1"),
        (torch.zeros(4, 6, dtype=torch.uint8), r"4 x 6; both sides must be multiples of 4: conditioning\.halvings=2"),
        (torch.zeros(4, 4), r"shape \(4, 4\), torch\.float32; must be \(height, width\) integers"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"shape \(1, 4, 4\)"),
    ],
    ids=["above", "below", "odd_side", "not_integers", "not_a_map"],
)
def test_wrong_label_maps_are_refused(given: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        label_map().prepare([given])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": 0}, r"^conditioning\.classes=0; must be at least 1"),
        ({"channels": 0}, r"^conditioning\.channels=0; must be at least 1"),
        ({"halvings": -1}, r"^conditioning\.halvings=-1; must be at least 0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        label_map(**changes)
    if "channels" in changes:
        with pytest.raises(ValueError, match=message):
            ConcatConfig(**changes)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    conditioner = label_map()
    inputs = conditioner.prepare([torch.arange(16).reshape(4, 4) % 6])
    compiled = torch.compile(lambda maps: conditioner(maps).concat, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), conditioner(inputs).concat)
