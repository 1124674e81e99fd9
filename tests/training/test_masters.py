import types
from dataclasses import replace

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm_scale.training import masters as masters_module
from ldm_scale.training.masters import Masters, chunked, laid_out, plain_masters, share, zero_masters
from ldm_scale.training.optimizer import OptimizerConfig


def masters_of(model: nn.Module) -> Masters:
    return plain_masters(model, OptimizerConfig().build(model))


def test_plain_masters_are_the_parameters():
    model = tiny.tiny()
    masters = masters_of(model)
    assert [piece.name for piece in masters.pieces] == [name for name, _ in model.named_parameters()]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(masters.tensors, model.parameters(), strict=True))
    whole = masters.consolidated(masters.tensors)
    assert whole is not None
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[name], parameter)


def test_a_checksum_knows_every_bit_and_its_place_but_no_cut():
    model = tiny.tiny()
    whole = masters_of(model)
    found = whole.checksum(whole.tensors)
    halves = [
        [replace(p, start=a, offset=a, numel=b - a) for a, b in ((0, p.numel // 2), (p.numel // 2, p.numel))]
        for p in whole.pieces
    ]
    cut = masters_of(model)
    cut.pieces = [piece for pair in reversed(halves) for piece in pair]
    assert cut.checksum(cut.tensors) == found
    values = model.conv.weight.data.view(-1)
    for change in (lambda: values.copy_(values.roll(1)), lambda: values[3].nextafter_(torch.tensor(9.0))):
        before = whole.checksum(whole.tensors)
        change()
        assert whole.checksum(whole.tensors) != before
    assert len(found) == 16


def test_pieces_are_in_logical_order_whatever_the_memory_format():
    plain, last = tiny.tiny(), tiny.tiny().to(memory_format=torch.channels_last)
    assert not last.conv.weight.is_contiguous()
    ours, theirs = masters_of(plain), masters_of(last)
    for piece in ours.pieces:
        flat = ours.read(ours.tensors, piece)
        assert torch.equal(flat, theirs.read(theirs.tensors, piece))
        theirs.write(theirs.tensors, piece, flat + 1)
    assert torch.equal(last.conv.weight, plain.conv.weight + 1)


def test_moments_exist_before_the_first_step_and_do_not_change_it():
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    adams = [OptimizerConfig().build(model) for model in models]
    masters = plain_masters(models[1], adams[1])
    assert masters.step == 0
    assert all(not moment.any() for moment in masters.moments("exp_avg") + masters.moments("exp_avg_sq"))
    for model, adam in zip(models, adams, strict=True):
        model(torch.ones(3)).sum().backward()
        adam.step()
    assert torch.equal(models[0].weight, models[1].weight)
    assert masters.step == 1


def test_assign_starts_anew_from_other_weights():
    model = tiny.tiny()
    masters = masters_of(model)
    masters.step = 5
    masters.moments("exp_avg")[0].fill_(1)
    torch.manual_seed(1)
    other = tiny.Tiny()
    masters.assign({name: p.detach() for name, p in other.named_parameters()})
    assert masters.step == 0
    assert not masters.moments("exp_avg")[0].any()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_assign_refuses_other_shapes_by_name():
    weights = {name: p.detach() for name, p in tiny.Tiny(width=4).named_parameters()}
    with pytest.raises(ValueError, match=r"conv\.weight"):
        masters_of(tiny.tiny()).assign(weights)


@given(world=st.integers(1, 40))
def test_replicated_masters_are_shared_out_exactly_once(world):
    masters = masters_of(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)))
    held = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in masters.shapes.items()}
    sizes = []
    for rank in range(world):
        mine = share(masters, rank, world)
        sizes.append(sum(piece.numel for piece in mine))
        for piece in mine:
            held[piece.name][piece.start : piece.start + piece.numel] += 1
    assert all((count == 1).all() for count in held.values())
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_chunks_hold_every_element_once_and_in_the_same_order_in_all_lists(memory, monkeypatch):
    monkeypatch.setattr(masters_module, "_CHUNK_ELEMENTS", {"cpu": 500})
    masters = masters_of(tiny.tiny().to(memory_format=memory))
    other = [tensor.detach() * 2 + 1 for tensor in masters.tensors]
    assert other[0].stride() == masters.tensors[0].stride()
    chunks = [chunk for rank in range(3) for chunk in chunked(share(masters, rank, 3), torch.device("cpu"))]
    ours, theirs = ([torch.cat(laid_out(tensors, chunk)) for chunk in chunks] for tensors in (masters.tensors, other))
    assert max(map(len, ours)) == 500
    assert torch.equal(torch.cat(theirs), torch.cat(ours) * 2 + 1)
    everything = torch.cat([tensor.detach().flatten() for tensor in masters.tensors])
    assert torch.equal(torch.cat(ours).sort()[0], everything.sort()[0])
    views = laid_out(masters.tensors, masters.pieces)
    assert all(view.data_ptr() == tensor.data_ptr() for view, tensor in zip(views, masters.tensors, strict=True))


def test_a_deepspeed_without_an_attribute_is_refused_by_name():
    zero = types.SimpleNamespace(single_partition_of_fp32_groups=[])
    fake = types.SimpleNamespace(optimizer=zero, zero_optimization_stage=lambda: 2)
    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match=r"parallel_partitioned_bit16_groups.*0\.19\.8.*engine\.kind=ddp"):
        zero_masters(fake, model, OptimizerConfig().build(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_no_element_is_lost_between_partitions(kind, two_processes):
    out, _ = two_processes
    whole = safetensors.torch.load_file(out / f"{kind}.safetensors")
    assert all(tensor.isfinite().all() for tensor in whole.values())  # consolidation starts from NaN
    shapes = {f"weight:{name}": parameter.shape for name, parameter in tiny.tiny().named_parameters()}
    assert {n: t.shape for n, t in whole.items() if n.startswith("weight:")} == shapes
