"""Bottleneck adapters (Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu
from transformers import PreTrainedModel

from clients._errors import TrainingError

_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "feed_forward")
_STD = 1e-3  # nearly the identity at first (section 2.1)


class Bottleneck(nn.Module):
    """`x + up(relu(down(x)))`, put behind attention and behind the MLP of each layer."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, size)
        self.up = nn.Linear(size, hidden_size)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inner: Tensor = self.up(relu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + inner.to(hidden.dtype)


def add_bottlenecks(model: PreTrainedModel, size: int) -> nn.ModuleList:
    """Put a bottleneck behind each attention and MLP; gives them, they are not in `model`.

    Raises:
        TrainingError: the model's layers name these parts in another way.
    """
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in (*_ATTENTION, *_MLP)
    ]
    expected = 2 * model.config.num_hidden_layers
    if len(found) != expected:
        raise TrainingError(
            f"{type(model).__name__} has {len(found)} parts named as attention or MLP; expected "
            f"{expected}, two in each layer. Choose another method."
        )
    added = nn.ModuleList(Bottleneck(model.config.hidden_size, size) for _ in found)
    for module, bottleneck in zip(found, added, strict=True):
        module.register_forward_hook(_behind(bottleneck))
    return added.to(model.device)


def _behind(bottleneck: nn.Module):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (bottleneck(output[0]), *output[1:])
        return bottleneck(output)

    return hook
