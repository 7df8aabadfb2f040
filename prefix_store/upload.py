"""Tell what was uploaded, by its content, and read it."""

from __future__ import annotations

from collections.abc import Sequence

from prefix_store.artefact import Artefact
from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import InvalidPrefixError
from prefix_store.peft_adapter import CONFIG_NAME, WEIGHTS_NAME, from_peft
from prefix_store.prefix import Prefix, version_of
from prefix_store.ptuning_v2 import from_ptuning_v2, is_ptuning_v2
from prefix_store.soft_prompt import PROMPT_EMBEDDINGS, SoftPrompt
from prefix_store.tensor_file import Buffer, check_tensor_file, is_tensor_file, tensor_names

_PEFT_PAIR = f"both {CONFIG_NAME} and {WEIGHTS_NAME} of a PEFT adapter"
_ACCEPTED = f"one prefix artefact, {_PEFT_PAIR}, or the prefix encoder of P-tuning v2"


def read_upload(files: Sequence[tuple[str, Buffer]], spec: BaseModelSpec) -> Artefact | SoftPrompt:
    """What is in one artefact of ours, in the two files of a PEFT adapter in any order, or in the
    prefix encoder of P-tuning v2.

    An artefact of ours is kept as it came; a soft prompt is still to be run through the model.

    Args:
        files: names, used in messages only, and contents.
        spec: the base model the prefix is for. `check_fits` is still the caller's to call.

    Raises:
        InvalidPrefixError: none of these, or not a valid prefix.
    """
    files = [(name[:80], data) for name, data in files]
    configs = [data for _, data in files if _is_json(data)]
    tensors = [(name, data) for name, data in files if not _is_json(data)]
    for name, data in tensors:
        check_tensor_file(repr(name), data)
    match configs, tensors:
        case [], [(_, data)] if PROMPT_EMBEDDINGS not in (names := tensor_names(data)):
            if is_ptuning_v2(names):
                return Artefact.of(from_ptuning_v2(data, spec))
            return Artefact(Prefix.from_bytes(data), data, version_of(data))
        case [config], [(_, data)]:
            adapter = from_peft(config, data, spec)
            return Artefact.of(adapter) if isinstance(adapter, Prefix) else adapter
        case [], [(name, _)]:
            raise InvalidPrefixError(f"{name!r} is one half of a PEFT adapter; upload {_PEFT_PAIR}")
        case [_], []:
            raise InvalidPrefixError(
                f"{files[0][0]!r} is JSON without tensors; upload {_PEFT_PAIR}"
            )
    found = ", ".join(repr(name) for name, _ in files[:5]) or "no file"
    raise InvalidPrefixError(f"found {found}; expected {_ACCEPTED}")


def _is_json(data: Buffer) -> bool:
    return not is_tensor_file(data) and bytes(data[:64]).lstrip().startswith(b"{")
