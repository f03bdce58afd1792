"""Collectives of a process that is alone."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from src.training import alone


@pytest.fixture
def group() -> Iterator[None]:
    """A default process group of the backend, gone afterwards."""
    dist.init_process_group(alone.register(), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_every_result_is_its_input() -> None:
    assert alone.register() == alone.register() == dist.get_backend()
    given = torch.tensor([1.0, -2.0])
    dist.all_reduce(given)
    dist.broadcast(given, 0)
    dist.reduce(given, 0)
    assert given.tolist() == [1.0, -2.0]
    gathered = [torch.zeros(2)]
    dist.all_gather(gathered, given)
    assert gathered[0].tolist() == [1.0, -2.0]
    together = torch.zeros(2)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13
    gather(together, given)
    assert together.tolist() == [1.0, -2.0]
    scattered = torch.zeros(2)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    scatter(scattered, given)
    assert scattered.tolist() == [1.0, -2.0]
    objects = [{"name": 1}]
    dist.broadcast_object_list(objects, 0)
    assert objects == [{"name": 1}]
    dist.barrier()


@pytest.mark.usefixtures("group")
def test_work_is_done_and_groups_can_be_made() -> None:
    given = torch.ones(3)
    work = dist.all_reduce(given, group=dist.new_group([0]), async_op=True)
    assert work is not None
    assert work.wait()
    assert work.get_future().done()


def test_a_group_of_two_is_none() -> None:
    with pytest.raises(AssertionError):
        alone.AloneGroup(0, 2)
