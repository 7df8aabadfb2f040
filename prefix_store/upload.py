"""Tell what was uploaded, by its content, and read it."""

from __future__ import annotations

from collections.abc import Sequence

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import InvalidPrefixError
from prefix_store.peft_adapter import CONFIG_NAME, TENSOR, WEIGHTS_NAME, from_peft
from prefix_store.prefix import Prefix
from prefix_store.tensor_file import Buffer, check_tensor_file, is_tensor_file, tensor_names

_PEFT_PAIR = f"both {CONFIG_NAME} and {WEIGHTS_NAME} of a PEFT adapter"
_ACCEPTED = f"one prefix artefact, or {_PEFT_PAIR}"


def read_upload(files: Sequence[tuple[str, Buffer]], spec: BaseModelSpec) -> Prefix:
    """The prefix in one artefact of ours, or in the two files of a PEFT adapter in any order.

    Args:
        files: names, used in messages only, and contents.
        spec: the base model the prefix is for. `check_fits` is still the caller's to call.

    Raises:
        InvalidPrefixError: neither of the two, or not a valid prefix.
    """
    files = [(name[:80], data) for name, data in files]
    configs = [data for _, data in files if _is_json(data)]
    tensors = [(name, data) for name, data in files if not _is_json(data)]
    for name, data in tensors:
        check_tensor_file(repr(name), data)
    match configs, tensors:
        case [], [(_, data)] if TENSOR not in tensor_names(data):
            return Prefix.from_bytes(data)
        case [config], [(_, data)]:
            return from_peft(bytes(config), data, spec)
        case [], [(name, _)]:
            raise InvalidPrefixError(f"{name!r} is one half of a PEFT adapter; upload {_PEFT_PAIR}")
        case [_], []:
            raise InvalidPrefixError(
                f"{files[0][0]!r} is JSON without tensors; upload {_PEFT_PAIR}"
            )
    names = ", ".join(repr(name) for name, _ in files[:5]) or "no file"
    raise InvalidPrefixError(f"found {names}; expected {_ACCEPTED}")


def _is_json(data: Buffer) -> bool:
    return not is_tensor_file(data) and data[:64].lstrip().startswith(b"{")
