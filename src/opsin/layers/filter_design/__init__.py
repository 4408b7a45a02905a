"""Filter design: one registry for each question that a survey of the field asks, usable on any network.

"On filter design in deep convolutional neural network" (2022): how filters start (`INITIALISERS`), which are made by
hand (`BANKS`), which are learned without labels (`LEARNERS`, PCANet), which size and shape they have (`SUBSTITUTIONS`,
receptive fields, widths at equal parameters), and how to tell good ones (`MEASURES`, `diagnose`).
"""

from opsin.layers.filter_design.banks import BANKS, bank, start_from_bank
from opsin.layers.filter_design.diagnostics import MEASURES, LayerReport, diagnose, table
from opsin.layers.filter_design.initialisers import INITIALISERS, fixup, initialise, lsuv
from opsin.layers.filter_design.pcanet import PCANet
from opsin.layers.filter_design.sizes import (
    SUBSTITUTIONS,
    Field,
    Substitution,
    conv_macs,
    equal_width,
    receptive_field,
    receptive_fields,
    scaled_width,
    seen_pixels,
    substitutions,
)
from opsin.layers.filter_design.unsupervised import LEARNERS, LearnedFilters, learn_filters

__all__ = [
    "BANKS", "INITIALISERS", "LEARNERS", "MEASURES", "SUBSTITUTIONS", "Field", "FilterDesign", "LayerReport",
    "LearnedFilters", "PCANet", "Substitution", "bank", "conv_macs", "diagnose", "equal_width", "fixup", "initialise",
    "learn_filters", "lsuv", "receptive_field", "receptive_fields", "scaled_width", "seen_pixels", "start_from_bank",
    "substitutions", "table",
]  # fmt: skip


class FilterDesign:
    """The toolbox as one object, as `opsin.create("filter_design")` gives it: its functions under their own names."""

    initialise = staticmethod(initialise)
    lsuv = staticmethod(lsuv)
    fixup = staticmethod(fixup)
    bank = staticmethod(bank)
    start_from_bank = staticmethod(start_from_bank)
    learn_filters = staticmethod(learn_filters)
    pcanet = PCANet
    receptive_field = staticmethod(receptive_field)
    receptive_fields = staticmethod(receptive_fields)
    seen_pixels = staticmethod(seen_pixels)
    conv_macs = staticmethod(conv_macs)
    substitutions = staticmethod(substitutions)
    scaled_width = staticmethod(scaled_width)
    equal_width = staticmethod(equal_width)
    diagnose = staticmethod(diagnose)
    table = staticmethod(table)

    @property
    def registries(self) -> dict[str, tuple[str, ...]]:
        """What there is, by question."""
        found = {
            "initialisers": INITIALISERS, "banks": BANKS, "learners": LEARNERS, "substitutions": SUBSTITUTIONS,
            "measures": MEASURES,
        }  # fmt: skip
        return {question: tuple(names) for question, names in found.items()}
