"""Forward passes over packed weights by this project's own CPU kernels."""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from prefix_store.model_loading import LoadedModel
from server.engine.beam_search import Reordering
from server.engine.kernels import MAX_QUERIES, Kernels, kernels_for, structures
from server.engine.packed_matrix import QuantizedRoom, project
from server.engine.packed_model import PackedModel, pack
from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.scheduler import SlotMove, Span
from server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_SHARING_ROWS = 8
# Relative error of the logits; anything that is left out or scaled is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
_INT8_TOLERANCE = 5e-1


class PackedRunner:
    """A Llama-shaped model on the CPU; every token of a step is a row of one batch.

    A row attends to its task's prefix where the prefix lies, shared by every sequence of the task
    and never copied, and then to its own slot. Rows of one task read the prefix together.
    """

    def __init__(
        self, model: PackedModel, kernels: Kernels, max_slots: int, max_length: int
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._dtype = model.embedding.dtype
        shape = (len(model.layers), max_slots, model.kv_heads, max_length, model.head_dim)
        # Not filled: nothing reads a position before it is written, and memory that no sequence has
        # reached yet stays with the operating system.
        self._keys = torch.empty(shape, dtype=self._dtype)
        self._values = torch.empty(shape, dtype=self._dtype)
        self._structure = model.structure
        self._threads = torch.get_num_threads()
        self._most_rows = max(
            1, min(_SHARING_ROWS, MAX_QUERIES * model.kv_heads // model.num_heads)
        )

    def start(self, sequence: Sequence) -> None:
        """See `Runner.start`: prefixes are read where they are."""

    def move(self, move: SlotMove) -> None:
        """See `Runner.move`."""
        for memory in (self._keys, self._values):
            memory[:, move.target, :, : move.length] = memory[:, move.source, :, : move.length]

    def reorder(self, reordering: Reordering) -> None:
        """See `Runner.reorder`: the prefix is in no slot."""
        sources, targets = list(reordering.sources), list(reordering.targets)
        first = max(0, reordering.start - reordering.prefix_length)
        own = slice(first, reordering.end - reordering.prefix_length)
        for memory in (self._keys, self._values):
            memory[:, targets, :, own] = memory[:, sources, :, own]

    def clear(self, slot: int) -> None:
        """See `Runner.clear`: no row reads a position that its own sequence has not written."""

    def forward(self, spans: Rows[Span]) -> torch.Tensor:
        """See `Runner.forward`."""
        # Neighbours of one prefix share its reads.
        order = sorted(range(len(spans)), key=lambda i: id(spans[i].sequence.prefix))
        rows = _Rows.of([spans[i] for i in order])
        hidden = self._layers(rows)
        ends = rows.ends[torch.tensor(order).argsort()].tolist()
        wanted = [
            row
            for span, end in zip(spans, ends, strict=True)
            for row in range(end - span.num_logits, end)
        ]
        return project(self._kernels.project, self._model.head, hidden[wanted], self._threads)

    def _layers(self, rows: _Rows) -> torch.Tensor:
        """The final norm's output, `[rows, hidden_size]`."""
        model = self._model
        hidden = torch.nn.functional.embedding(rows.token_ids, model.embedding)
        normed = torch.empty_like(hidden)
        work = _Work.of(model, rows.count, self._dtype)
        step = structures.Step(
            **{name: tensor.data_ptr() for name, tensor in rows.addressed.items()},
            **{name: tensor.data_ptr() for name, tensor in work.addressed.items()},
            residual=hidden.data_ptr(),
            normed=normed.data_ptr(),
            keys=self._keys.data_ptr(),
            values=self._values.data_ptr(),
            layer_stride=self._keys.stride(0),
            slot_stride=self._keys.stride(1),
            head_stride=self._keys.stride(2),
            quantized=work.quantized.structure,
            rows=rows.count,
            rows_per_group=self._rows_per_group(rows.count),
            threads=self._threads,
        )
        self._kernels.layers(ctypes.byref(self._structure), ctypes.byref(step))
        return normed

    def _rows_per_group(self, rows: int) -> int:
        """Rows that share a prefix's reads: as many as leave every core several groups."""
        groups = 4 * self._threads
        return max(1, min(self._most_rows, rows * self._model.kv_heads // groups))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A step's rows, one per token.

    Attributes:
        token_ids: int64 `[rows]`.
        ends: int64 `[spans]`, one past each span's last row.
        addressed: int64 `[rows]` each, by their names in `structures.Step`. Of a row: its slot,
            `positions` in the text, `indices` in its slot, `lengths` of its slot that it sees, and
            its prefix, whose tensors the spans' sequences keep.
    """

    count: int
    token_ids: torch.Tensor
    ends: torch.Tensor
    addressed: dict[str, torch.Tensor]

    @classmethod
    def of(cls, spans: Rows[Span]) -> _Rows:
        sizes = torch.tensor([len(span.token_ids) for span in spans])
        ends = sizes.cumsum(0)
        count = int(ends[-1])
        per_span = torch.tensor([_describe(span) for span in spans])
        slots, starts, keys, values, lengths = per_span.repeat_interleave(sizes, 0).T.contiguous()
        positions = torch.arange(count) - (ends - sizes).repeat_interleave(sizes) + starts
        indices = positions - lengths
        token_ids = list(itertools.chain.from_iterable(span.token_ids for span in spans))
        addressed = {
            "slots": slots,
            "positions": positions,
            "indices": indices,
            "lengths": indices + 1,
            "prefix_keys": keys,
            "prefix_values": values,
            "prefix_lengths": lengths,
            "groups": torch.empty(2 * count, dtype=torch.int64),
        }
        return cls(count, torch.tensor(token_ids), ends, addressed)


@dataclass(frozen=True, slots=True)
class _Work:
    """Memory of one step, by its names in `structures.Step`."""

    addressed: dict[str, torch.Tensor]
    quantized: QuantizedRoom

    @classmethod
    def of(cls, model: PackedModel, rows: int, dtype: torch.dtype) -> _Work:
        widths = {
            "delta": model.hidden_size,
            "qkv": (model.num_heads + 2 * model.kv_heads) * model.head_dim,
            "mixed": model.num_heads * model.head_dim,
            "gated": model.intermediate_size,
        }
        addressed = {name: torch.empty(rows, n, dtype=dtype) for name, n in widths.items()}
        deepest = max(widths.values())
        return cls(addressed, QuantizedRoom(rows, deepest))


def _describe(span: Span) -> tuple[int, int, int, int, int]:
    """Slot, first position, and the prefix's keys' and values' addresses and length."""
    sequence, prefix = span.sequence, span.sequence.prefix
    if prefix is None:
        return sequence.slot, span.start, 0, 0, 0
    keys, values = prefix.keys.data_ptr(), prefix.values.data_ptr()
    return sequence.slot, span.start, keys, values, prefix.prefix_length


def packed_runner(
    loaded: LoadedModel, max_slots: int, max_length: int, *, int8: bool = False
) -> PackedRunner | None:
    """The packed runner where it serves `loaded` exactly (but for `int8` weights), else None."""
    model = loaded.model
    if model.device.type != "cpu" or model.dtype not in _TOLERANCE:
        return None
    kernels = kernels_for(model.dtype)
    if kernels is None:
        logger.warning(
            "the CPU kernels were not built, so the engine runs slower: install a C compiler (on "
            "Debian: apt-get install gcc) and install prefixserve again"
        )
        return None
    packed = pack(model, max_length, int8=int8)
    if packed is None:
        return None
    runner = PackedRunner(packed, kernels, max_slots, max_length)
    tolerance = _INT8_TOLERANCE if int8 else _TOLERANCE[model.dtype]
    same = _error_of_logits(runner, loaded, min(32, max_length)) < tolerance
    return runner if same else None


@torch.inference_mode()
def _error_of_logits(runner: PackedRunner, loaded: LoadedModel, length: int) -> float:
    """How far the logits after `length` tokens are from the model's own, relative to their norm.

    A config can scale embeddings, residuals or norms in ways that the structure does not show.
    """
    vocab = loaded.model.config.vocab_size
    # From the middle: the first ids are often special tokens, whose activations are extreme.
    token_ids = tuple(vocab // 2 + i % (vocab // 2) for i in range(length))
    sequence = Sequence(GenerationRequest("check", token_ids, SamplingParams(1)), None, slot=0)
    found = runner.forward([Span(sequence, 0, token_ids)])[0].float()
    expected = loaded.model(torch.tensor([token_ids])).logits[0, -1].float()
    return float((found - expected).norm() / expected.norm())
