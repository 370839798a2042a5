"""A term that records the view of every layer."""

from torch import Tensor

from titan_moe.model.transformer import Transformer
from torchtitan_ext.terms import LayerView, Needs, Setting, Term, TermOptions, Terms


class Spy(Term):
    """Its value is 0. It needs activations and outputs; since it has a weight, the views are not detached."""

    name = "spy"
    needs = Needs(activations=True, outputs=True)

    def __init__(self) -> None:
        super().__init__(TermOptions(weight=1.0), Setting(top_k=0))
        self.views: list[LayerView] = []

    def value(self, view: LayerView) -> Tensor:
        self.views.append(view)
        return view.weights_T.new_zeros(())


def spy_on(model: Transformer) -> Spy:
    """Adds a spy after the model's terms."""
    spy = Spy()
    model.terms = Terms([*model.terms.terms, spy])
    for moe in model.moe_modules():
        moe.terms = model.terms
    return spy
