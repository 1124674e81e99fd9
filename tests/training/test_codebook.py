"""Use of the codebook counted, and dead entries started again: by hand, over a resume, and on two processes."""

from pathlib import Path
from typing import Any

import codebook
import pytest
import torch

from ldm_scale.first_stage.vq import perplexity, usage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> codebook.Training:
    training = codebook.Training("one_process", tmp_path_factory.mktemp("codebook"))
    for _ in range(codebook.STEPS):
        training.step()
    training.engine.close()
    return training


def test_usage_and_perplexity_are_those_of_hand_made_counts():
    counts = torch.tensor([4, 4, 0, 4, 4, 0, 0, 0])
    assert usage(counts).item() == 0.5
    assert perplexity(counts).item() == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([3, 1])).item() == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_dead_entries_start_at_latents_of_the_batch_and_others_stay(tmp_path: Path):
    training = codebook.Training("one_process", tmp_path)
    watched = codebook.Training("one_process", tmp_path, restart=False)
    for each in (training, watched):
        each.step()
        assert each.found == [{}]  # the window has not ended
        each.step()
    assert training.found == watched.found
    (_, found) = training.found
    dead = training.tables["exp_avg_sq"].eq(0).all(1)
    assert found["train/codebook_usage"] == pytest.approx(1 - dead.float().mean().item())
    assert 0 < dead.sum() < codebook.ENTRY_COUNT
    latents = torch.cat(training.latents).movedim(1, -1).flatten(0, 2)
    for name, table in training.tables.items():
        assert torch.equal(table[~dead], watched.tables[name][~dead])
        if name.startswith("exp"):
            assert torch.equal(table[dead], torch.zeros_like(table[dead]))
        else:
            assert all((latents == entry).all(1).any() for entry in table[dead])
    training.step()
    training.step()
    assert training.found[-1]["train/codebook_usage"] > found["train/codebook_usage"]
    assert training.found[-1]["train/codebook_perplexity"] > found["train/codebook_perplexity"]


def test_latents_that_are_no_numbers_never_become_entries(tmp_path: Path):
    training = codebook.Training("one_process", tmp_path)
    training.step()
    before = training.tables["weight"]
    with torch.no_grad():
        training.engine.module.quant_conv.bias.fill_(torch.nan)
    training.step()
    assert torch.equal(training.tables["weight"], before)


def test_a_resume_in_the_middle_of_a_window_is_the_same_run(undisturbed: codebook.Training, tmp_path: Path):
    first, second = (codebook.Training("one_process", tmp_path) for _ in range(2))
    for _ in range(3):
        first.step()
    second.resume(first.save())
    for _ in range(codebook.STEPS - 3):
        second.step()
    assert second.found == undisturbed.found[3:]
    assert all(torch.equal(second.tables[name], table) for name, table in undisturbed.tables.items())


@pytest.fixture(scope="module")
def on_two(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    done = launch("codebook.py", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_cut_up_between_two_processes_a_codebook_trains_like_a_whole_one(kind: str, on_two: Path, tmp_path: Path):
    alone = codebook.Training("one_process", tmp_path, restart=False)
    for _ in range(codebook.STEPS):
        alone.step()
    ours = torch.load(on_two / f"{kind}.pt")
    assert ours["found"][-1] == pytest.approx(alone.found[-1])
    torch.testing.assert_close(ours["weight"], alone.tables["weight"], rtol=1e-3, atol=1e-5)
    alone.engine.close()


@pytest.mark.slow
def test_two_processes_restart_the_same_entries_at_the_same_latents(
    undisturbed: codebook.Training, on_two: Path, tmp_path: Path
):
    one, other = (torch.load(on_two / f"rank{rank}.pt") for rank in (0, 1))
    assert one["found"] == other["found"]
    assert one["found"][-1] == pytest.approx(undisturbed.found[-1])
    for name, table in undisturbed.tables.items():
        assert torch.equal(one["tables"][name], other["tables"][name])
        torch.testing.assert_close(one["tables"][name], table, rtol=1e-3, atol=1e-5)
    alone = codebook.Training("one_process", tmp_path)  # from two processes to one
    alone.resume(on_two / "checkpoints" / "images_000000000024")
    for _ in range(codebook.STEPS - 3):
        alone.step()
    torch.testing.assert_close(alone.tables["weight"], undisturbed.tables["weight"], rtol=1e-3, atol=1e-5)
