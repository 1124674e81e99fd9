import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_scale.training.batch_fit import BatchFit, FittedBatch, divisors, fit_batch

sizes = st.integers(1, 5000)


def test_accumulation_is_derived():
    assert fit_batch(global_batch=680, micro_batch=17, world=8) == FittedBatch(680, 17, 5)


@given(accumulation=st.integers(1, 50), micro=st.integers(1, 64), world=st.integers(1, 64))
def test_what_divides_is_taken_as_it_is(accumulation, micro, world):
    wanted = accumulation * micro * world
    for fit in BatchFit:
        assert fit_batch(global_batch=wanted, micro_batch=micro, world=world, fit=fit).global_batch == wanted


@given(sizes, st.integers(1, 64), st.integers(1, 64))
def test_nearest_is_nearest(wanted, micro, world):
    fitted = fit_batch(global_batch=wanted, micro_batch=micro, world=world, fit=BatchFit.nearest)
    images = fitted.accumulation * fitted.micro_batch
    assert fitted.global_batch == images * world
    assert min(micro, images) <= 2 * fitted.micro_batch <= 2 * micro
    coarse = abs(max(1, round(wanted / (micro * world))) * micro * world - wanted)  # in micro batches as stated
    assert abs(fitted.global_batch - wanted) <= coarse


@pytest.mark.parametrize(
    ("world", "fitted"),
    [
        (16, FittedBatch(672, 14, 3)),
        (63, FittedBatch(693, 11, 1)),
        (504, FittedBatch(504, 1, 1)),
        (512, FittedBatch(512, 1, 1)),
    ],
)
def test_the_batch_of_the_paper_on_other_worlds(world, fitted):
    assert fit_batch(global_batch=680, micro_batch=17, world=world, fit=BatchFit.nearest) == fitted


def test_refusal_lists_what_fits():
    with pytest.raises(ValueError) as refused:
        fit_batch(global_batch=680, micro_batch=16, world=8)
    message = str(refused.value)
    assert "micro_batch 1, 5, 17, 85" in message  # divisors of 680 / 8
    assert "processes none" in message  # 16 does not divide 680
    assert "global_batch 640, 768" in message
    assert "batch_fit=nearest" in message


def test_refusal_lists_worlds():
    with pytest.raises(ValueError, match=r"processes 1, 2, 4, 5, 8, 10, 17, 20, 34, 40, 68, 85;"):
        fit_batch(global_batch=680, micro_batch=1, world=9)


@pytest.mark.parametrize("sizes", [{"global_batch": 0, "micro_batch": 1}, {"global_batch": 8, "micro_batch": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        fit_batch(**sizes, world=1)


@given(st.integers(1, 3000))
def test_divisors(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
