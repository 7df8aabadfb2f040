"""Forward passes over packed weights with this project's own CPU kernels."""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from prefix_store.model_loading import LoadedModel
from server.engine.kernels import MAX_QUERIES, AttentionArguments, Kernels, kernels_for
from server.engine.packed_model import PackedModel, pack
from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.scheduler import SlotMove, Span
from server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_SHARING_ROWS = 8
# Relative error of the logits; anything that is left out or scaled is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


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
        self._most_rows = max(
            1, min(_SHARING_ROWS, MAX_QUERIES * model.kv_heads // model.num_heads)
        )

    def start(self, sequence: Sequence) -> None:
        """See `Runner.start`: prefixes are read where they are."""

    def move(self, move: SlotMove) -> None:
        """See `Runner.move`."""
        for memory in (self._keys, self._values):
            memory[:, move.target, :, : move.length] = memory[:, move.source, :, : move.length]

    def clear(self, slot: int) -> None:
        """See `Runner.clear`: no row reads a position that its own sequence has not written."""

    def forward(self, spans: Rows[Span]) -> torch.Tensor:
        """See `Runner.forward`."""
        # Neighbours of one prefix share its reads.
        order = sorted(range(len(spans)), key=lambda i: id(spans[i].sequence.prefix))
        step = _Step.of([spans[i] for i in order])
        hidden = self._layers(step)
        inverse = torch.tensor(order).argsort()
        last = (step.ends - 1)[inverse]
        return self._model.head(hidden[last])

    def _layers(self, step: _Step) -> torch.Tensor:
        """The final norm's output, `[rows, hidden_size]`."""
        model, kernels, rows = self._model, self._kernels, step.rows
        residual = torch.nn.functional.embedding(step.token_ids, model.embedding)
        normed = torch.empty_like(residual)
        mixed = torch.empty(rows, model.num_heads * model.head_dim, dtype=self._dtype)
        gated = torch.empty(rows, model.intermediate_size, dtype=self._dtype)
        attention = self._attention_arguments(step, mixed)
        rows_per_task = self._rows_per_task(rows)
        delta: torch.Tensor | None = None

        def add_and_norm(weight: torch.Tensor) -> None:
            kernels.add_rms_norm(
                residual.data_ptr(),
                None if delta is None else delta.data_ptr(),
                weight.data_ptr(),
                normed.data_ptr(),
                rows,
                model.hidden_size,
                model.epsilon,
            )

        for index, layer in enumerate(model.layers):
            add_and_norm(layer.input_norm)
            qkv = layer.qkv(normed)
            self._rotate_and_store(index, qkv, step)
            attention.queries = qkv.data_ptr()
            attention.keys = self._keys[index].data_ptr()
            attention.values = self._values[index].data_ptr()
            attention.layer = index
            kernels.attention(ctypes.byref(attention), rows_per_task, step.tasks.data_ptr())
            delta = layer.output(mixed)
            add_and_norm(layer.mlp_norm)
            gate_up = layer.gate_up(normed)
            kernels.silu_multiply(
                gate_up.data_ptr(), gated.data_ptr(), rows, model.intermediate_size
            )
            delta = layer.down(gated)
        add_and_norm(model.norm)
        return normed

    def _rotate_and_store(self, index: int, qkv: torch.Tensor, step: _Step) -> None:
        model, keys = self._model, self._keys
        self._kernels.rotate_and_store(
            qkv.data_ptr(),
            model.cosine.data_ptr(),
            model.sine.data_ptr(),
            keys[index].data_ptr(),
            self._values[index].data_ptr(),
            step.slots.data_ptr(),
            step.indices.data_ptr(),
            step.positions.data_ptr(),
            step.rows,
            model.num_heads,
            model.kv_heads,
            model.head_dim,
            keys.stride(1),
            keys.stride(2),
        )

    def _attention_arguments(self, step: _Step, output: torch.Tensor) -> AttentionArguments:
        model = self._model
        return AttentionArguments(
            output=output.data_ptr(),
            slots=step.slots.data_ptr(),
            lengths=step.lengths.data_ptr(),
            prefix_keys=step.prefix_keys.data_ptr(),
            prefix_values=step.prefix_values.data_ptr(),
            prefix_lengths=step.prefix_lengths.data_ptr(),
            rows=step.rows,
            num_heads=model.num_heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            query_stride=(model.num_heads + 2 * model.kv_heads) * model.head_dim,
            slot_stride=self._keys.stride(1),
            head_stride=self._keys.stride(2),
            scale=model.scale,
        )

    def _rows_per_task(self, rows: int) -> int:
        """Rows that share a prefix's reads: as many as leave every core several tasks."""
        tasks = 4 * torch.get_num_threads()
        return max(1, min(self._most_rows, rows * self._model.kv_heads // tasks))


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's rows, one per token; int64 tensors `[rows]` but for `ends` and `tasks`.

    Attributes:
        indices: where in its slot a row's keys and values go.
        lengths: positions of its slot that a row sees.
        prefix_keys, prefix_values: addresses; the spans' sequences keep the tensors alive.
        ends: `[spans]`, one past each span's last row.
        tasks: scratch for the attention kernel.
    """

    rows: int
    token_ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    indices: torch.Tensor
    lengths: torch.Tensor
    prefix_keys: torch.Tensor
    prefix_values: torch.Tensor
    prefix_lengths: torch.Tensor
    ends: torch.Tensor
    tasks: torch.Tensor

    @classmethod
    def of(cls, spans: Rows[Span]) -> _Step:
        sizes = torch.tensor([len(span.token_ids) for span in spans])
        ends = sizes.cumsum(0)
        rows = int(ends[-1])
        per_span = torch.tensor([_describe(span) for span in spans])
        slots, starts, keys, values, lengths = per_span.repeat_interleave(sizes, 0).T.contiguous()
        positions = torch.arange(rows) - (ends - sizes).repeat_interleave(sizes) + starts
        indices = positions - lengths
        token_ids = list(itertools.chain.from_iterable(span.token_ids for span in spans))
        return cls(
            rows=rows,
            token_ids=torch.tensor(token_ids),
            slots=slots,
            positions=positions,
            indices=indices,
            lengths=indices + 1,
            prefix_keys=keys,
            prefix_values=values,
            prefix_lengths=lengths,
            ends=ends,
            tasks=torch.empty(2 * rows, dtype=torch.int64),
        )


def _describe(span: Span) -> tuple[int, int, int, int, int]:
    """Slot, first position, and the prefix's keys' and values' addresses and length."""
    sequence, prefix = span.sequence, span.sequence.prefix
    if prefix is None:
        return sequence.slot, span.start, 0, 0, 0
    keys, values = prefix.keys.data_ptr(), prefix.values.data_ptr()
    return sequence.slot, span.start, keys, values, prefix.prefix_length


def packed_runner(loaded: LoadedModel, max_slots: int, max_length: int) -> PackedRunner | None:
    """The packed runner where it serves `loaded` exactly, else None."""
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
    packed = pack(model, max_length)
    if packed is None:
        return None
    runner = PackedRunner(packed, kernels, max_slots, max_length)
    return runner if _computes_the_same(runner, loaded, min(32, max_length)) else None


@torch.inference_mode()
def _computes_the_same(runner: PackedRunner, loaded: LoadedModel, length: int) -> bool:
    """Whether the logits after `length` tokens are the model's own, to its dtype's precision.

    A config can scale embeddings, residuals or norms in ways that the structure does not show.
    """
    vocab = loaded.model.config.vocab_size
    # From the middle: the first ids are often special tokens, whose activations are extreme.
    token_ids = tuple(vocab // 2 + i % (vocab // 2) for i in range(length))
    sequence = Sequence(GenerationRequest("check", token_ids, SamplingParams(1)), None, slot=0)
    found = runner.forward([Span(sequence, 0, token_ids)])[0].float()
    expected = loaded.model(torch.tensor([token_ids])).logits[0, -1].float()
    error = (found - expected).norm() / expected.norm()
    return bool(error < _TOLERANCE[loaded.model.dtype])
