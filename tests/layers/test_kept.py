"""Tables that are made once."""

import torch

from opsin.layers.kept import constant


@constant
def steps(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device)


def test_equal_arguments_give_the_same_tensor():
    assert steps(3, torch.device("cpu")) is steps(3, torch.device("cpu"))
    assert steps(4, torch.device("cpu")).tolist() == [0, 1, 2, 3]
    assert steps(4, torch.device("meta")).is_meta


def test_what_inference_mode_made_serves_training():
    with torch.inference_mode():
        steps(5, torch.device("cpu"))
    x = torch.randn(5, requires_grad=True)
    x.index_select(0, steps(5, torch.device("cpu"))).sum().backward()
    assert x.grad.tolist() == [1.0] * 5


def test_a_captured_graph_leaves_nothing_behind():
    class Shifted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + steps(x.shape[0], x.device)

    exported = torch.export.export(Shifted(), (torch.zeros(7),)).module()
    assert exported(torch.ones(7)).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert type(steps(7, torch.device("cpu"))) is torch.Tensor, "not one of the capture's fake tensors"
