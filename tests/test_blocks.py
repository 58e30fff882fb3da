"""What a step works on at a time: views and packed copies of the parameters' tensors, in parts that fit a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import RULES, Problem, assert_same

import lightning_soaa._bucket as sizes
from lightning_soaa._bucket import Bucket, divide

shapes = st.lists(
    st.sampled_from([(), (0,), (1,), (3,), (2, 3), (4, 4), (5, 1, 3), (40,), (3, 0), (9, 9)]), max_size=12
)


def bucket_of(tensors):
    """A bucket whose parameters, gradients and state count up through its coordinates."""
    return Bucket(
        0, 1, 0.9, 0.99, 1e-8, True,
        params=tensors, owners=list(range(len(tensors))),
        grads=[t + 0.25 for t in tensors], state={"m": [t + 0.5 for t in tensors]},
        coordinates=sum(t.numel() for t in tensors),
    )  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """Blocks of 16 entries, packs of tensors of up to 4."""
    monkeypatch.setattr(sizes, "CACHED", 16)
    monkeypatch.setattr(sizes, "SMALL", 4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shapes.filter(bool), st.booleans())
def test_blocks_hold_every_coordinate_once_and_no_more_than_fits(which, transposed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "CACHED", 16)
        patch.setattr(sizes, "SMALL", 4)
        start, tensors = 0, []
        for shape in which:
            size = torch.Size(shape).numel()
            tensor = torch.arange(start, start + size, dtype=torch.float64).reshape(shape)
            tensors.append(tensor.T.contiguous().T if transposed and tensor.ndim == 2 else tensor)
            start += size
        blocks = divide(bucket_of(tensors))
        entries = torch.cat([param.flatten() for block in blocks for param in block.params])
        assert sorted(entries.tolist()) == list(range(start))
        assert sum(block.coordinates for block in blocks) == start
        for block in blocks:
            assert block.numel <= 16 or len(block.params) == 1
            flat = torch.cat([param.flatten() for param in block.params])
            for shift, held in ((0.25, block.grads), (0.5, block.state["m"])):
                assert torch.equal(torch.cat([tensor.flatten() for tensor in held]), flat + shift)
            for owner, param in zip(block.owners, block.params, strict=True):
                assert set(param.flatten().tolist()) <= set(tensors[owner].flatten().tolist())
            spread = block.spread(block.grads)
            assert [t.shape for t in spread] == [p.shape for p in block.params]
            assert all(torch.equal(t, p + 0.25) for t, p in zip(spread, block.params, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes.filter(bool), st.booleans())
def test_parts_of_blocks_hold_every_coordinate_once_and_no_more_than_fits(which, transposed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "CACHED", 16)
        patch.setattr(sizes, "SMALL", 4)
        tensors, start = [], 0
        for shape in which:
            tensor = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
            tensors.append(tensor.T.contiguous().T if transposed and tensor.ndim == 2 else tensor)
            start += tensor.numel()
        blocks = divide(bucket_of(tensors), whole=True)
        assert sum(block.whole for block in blocks) <= 1
        assert all(block.numel <= 16 for block in blocks if not block.whole)
        parts = [part for block in blocks for part in block.parts()]
        assert all(part.numel <= 16 or not part.params[0].is_contiguous() for part in parts)
        entries = torch.cat([param.flatten() for part in parts for param in part.params])
        assert sorted(entries.tolist()) == list(range(start))
        for part in parts:
            flat = torch.cat([param.flatten() for param in part.params])
            assert torch.equal(torch.cat([grad.flatten() for grad in part.grads]), flat + 0.25)
            assert torch.equal(torch.cat([tensor.flatten() for tensor in part.state["m"]]), flat + 0.5)


def test_what_is_done_to_a_block_arrives_in_the_tensors_themselves(tiny):
    tensors = [torch.zeros(shape, dtype=torch.float64) for shape in ((2,), (5, 9), (), (2, 2), (45,))]
    tensors[1] = tensors[1].T
    bucket = bucket_of(tensors)
    blocks = divide(bucket)
    assert any(block.packed for block in blocks)
    for block in blocks:
        for held in (block.params, block.state["m"]):
            for tensor in held:
                tensor += 1
        block.store()
    assert all(bool((param == 1).all()) for param in bucket.params)
    assert all(bool((moment == 1.5).all()) for moment in bucket.state["m"])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_change_a_run_by_the_rounding_of_its_sums_only(monkeypatch, rule, foreach):
    def run():
        return Problem(rule, weight_decay=0.1, foreach=foreach).run(40).facts()

    whole = run()
    monkeypatch.setattr(sizes, "CACHED", 7)
    monkeypatch.setattr(sizes, "SMALL", 3)
    for key, value in run().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, whole[key], rtol=1e-10, atol=1e-12)
        elif isinstance(value, float):
            assert value == pytest.approx(whole[key], rel=1e-7, abs=1e-12), key


@pytest.mark.parametrize("rule", RULES)
def test_multi_tensor_operations_agree_with_a_for_loop_bit_for_bit_in_blocks_too(tiny, rule):
    runs = [Problem(rule, weight_decay=0.1, foreach=foreach).run(40).facts() for foreach in (True, False)]
    assert_same(*runs, but=["foreach"])
