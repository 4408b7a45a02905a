"""Who reads whose output."""

from torch import nn

from opsin.layers.readers import Reading, readings, sole_readers


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


class Looks(nn.Module):
    """Reads the shape of a tensor beside the tensor."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Sequential(nn.Identity(), nn.Linear(4, 4))

    def forward(self, x):
        y = self.norm(x)
        return self.inner(y).view(y.shape[0], -1)


class Twice(nn.Module):
    """The norm is called twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x)) + self.norm(x + 1)


class Untraceable(nn.Module):
    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts) if bool(x.sum() > 0) else x


def test_through_containers_and_past_questions_of_shape():
    assert sole_readers(Looks(), is_norm, is_linear) == [("norm", "inner.1")]
    assert sole_readers(Untraceable(Looks()), is_norm, is_linear) == [("parts.0.norm", "parts.0.inner.1")]
    assert not sole_readers(Looks(), is_linear, is_norm)


def test_called_twice_is_not_read_alone():
    assert not sole_readers(Twice(), is_norm, is_linear)


def test_one_module_in_two_places_is_not_read_alone():
    norm = nn.LayerNorm(4)
    parts = [nn.Sequential(norm, nn.Linear(4, 4)) for _ in range(2)]
    for model in (nn.Sequential(*parts), Untraceable(*parts)):
        assert not sole_readers(model, is_norm, is_linear)


def test_readings_name_every_call():
    assert readings(Looks(), is_linear) == [Reading(None, "norm"), Reading("norm", "inner.1")]
