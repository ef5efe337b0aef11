"""What is found out about a tensor once, and when it must be found out again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from saft_kernels.once import once, once_of_memory


class Looks:
    """Counts how often a tensor was looked at."""

    def __init__(self, ask=once) -> None:
        self.ask = ask
        self.count = 0

    def at(self, tensor: Tensor, what: object = "sum") -> int:
        def look() -> int:
            self.count += 1
            return int(tensor.sum())

        return self.ask(tensor, what, look)


def test_a_tensor_is_looked_at_once_until_it_is_written():
    looks, tensor = Looks(), torch.arange(5)
    assert [looks.at(tensor), looks.at(tensor)] == [10, 10]
    assert looks.count == 1
    tensor.add_(1)
    assert looks.at(tensor) == 15
    assert looks.count == 2


def test_a_write_through_a_view_counts():
    looks, tensor = Looks(), torch.arange(5)
    looks.at(tensor)
    tensor[2:].zero_()
    assert looks.at(tensor) == 1


def test_views_of_one_place_are_the_same_and_others_are_not():
    looks, tensor = Looks(), torch.arange(6)
    assert [looks.at(tensor[1:4]), looks.at(tensor[1:4])] == [6, 6]
    assert looks.count == 1
    others = [tensor[2:5], tensor[1:3], tensor[1::2], tensor.view(2, 3), tensor[1:4].view(3, 1)]
    assert [looks.at(other) for other in others] == [9, 3, 9, 15, 6]


def test_a_view_in_another_dtype_holds_other_numbers():
    looks, tensor = Looks(), torch.tensor([1 << 32, 0])
    assert looks.at(tensor) == 1 << 32
    assert looks.at(tensor.view(torch.int32)[:2]) == 1


def test_every_question_has_an_answer_of_its_own():
    looks, tensor = Looks(), torch.arange(5)
    looks.at(tensor, "one"), looks.at(tensor, "other")
    assert looks.count == 2


def test_all_views_share_what_is_known_of_their_memory():
    looks, tensor = Looks(once_of_memory), torch.arange(5)
    assert [looks.at(tensor), looks.at(tensor[:2])] == [10, 10]


def test_nothing_is_kept_in_inference_mode():
    looks, ordinary = Looks(), torch.arange(5)
    with torch.inference_mode():
        made_there = torch.arange(5)
        for tensor in (ordinary, made_there):
            looks.at(tensor), looks.at(tensor)
    looks.at(made_there)
    assert looks.count == 5


@pytest.mark.parametrize("ask", [once, once_of_memory])
def test_a_tensor_is_not_kept_alive(ask):
    tensor = torch.arange(5)
    Looks(ask).at(tensor)
    reference = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert reference() is None
