"""A term that keeps what it sees of every layer."""

from torch import Tensor

from titan_moe.model.transformer import Transformer
from torchtitan_ext.terms import LayerView, Needs, Setting, Term, TermOptions, Terms


class Spy(Term):
    """Asks for activations and outputs; its value is 0. Its weight keeps the gradients of what it sees."""

    name = "spy"
    needs = Needs(activations=True, outputs=True)

    def __init__(self) -> None:
        super().__init__(TermOptions(weight=1.0), Setting(top_k=0))
        self.views: list[LayerView] = []

    def value(self, view: LayerView) -> Tensor:
        self.views.append(view)
        return view.weights_T.new_zeros(())


def spy_on(model: Transformer) -> Spy:
    """Adds a spy behind the model's terms."""
    spy = Spy()
    model.terms = Terms([*model.terms.terms, spy])
    for moe in model.moe_modules():
        moe.terms = model.terms
    return spy
