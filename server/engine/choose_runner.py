"""Which runner serves a model."""

from __future__ import annotations

from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import LoadedModel
from server.engine.encoder_decoder import EncoderDecoderRunner
from server.engine.packed_runner import packed_runner
from server.engine.runner import Runner, transformers_runner


def choose_runner(
    loaded: LoadedModel,
    max_slots: int,
    max_length: int,
    *,
    int8: bool = False,
    cuda_graphs: bool = True,
) -> Runner:
    """The fast runner where the model's structure and the machine allow, else the general one.

    Raises:
        ModelLoadError: `int8` and only the general runner can serve it, or no runner can.
    """
    packed = None
    if loaded.spec.encoder is None:
        packed = packed_runner(loaded, max_slots, max_length, int8=int8)
    if packed is None and int8:
        raise ModelLoadError(
            f"{loaded.spec.name} cannot run with int8 weights here: that needs a model built like "
            f"Llama, on a CPU (it is on {loaded.model.device}), with the kernels compiled; start "
            "without --quantize"
        )
    if loaded.spec.encoder is not None:
        return EncoderDecoderRunner(loaded, max_slots, max_length)
    return packed or transformers_runner(loaded, max_slots, max_length, cuda_graphs=cuda_graphs)
