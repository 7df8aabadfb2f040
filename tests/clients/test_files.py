"""What `upload` makes of its arguments."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from clients import InvalidArgumentError, PrefixFileError
from clients._files import UploadSource, upload_body


class Artefact:
    def to_bytes(self) -> bytes:
        return b"tensors"


def parts(source: UploadSource | None, text: str | None = None) -> dict[str, bytes]:
    with upload_body(source, text) as body:
        return {name: file.read() for _, (name, file) in body["files"]}


def adapter(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_bytes_and_prefixes_are_one_file() -> None:
    assert parts(b"tensors") == parts(Artefact()) == {"prefix.safetensors": b"tensors"}


@pytest.mark.parametrize("as_text", [False, True])
def test_a_file_keeps_its_name(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "e2e.safetensors"
    path.write_bytes(b"tensors")
    assert parts(str(path) if as_text else path) == {"e2e.safetensors": b"tensors"}


def test_of_an_adapter_folder_only_the_two_files_are_sent(tmp_path: Path) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    folder = adapter(tmp_path, *names, "README.md", "optimizer.pt")
    assert parts(folder) == {name: name.encode() for name in names}


def test_files_are_closed_also_on_failure(tmp_path: Path) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    failing = ExitStack()
    body = failing.enter_context(upload_body(adapter(tmp_path, *names), None))
    files = [file for _, (_, file) in body["files"]]
    error = RuntimeError()
    assert not failing.__exit__(RuntimeError, error, None)
    assert [file.closed for file in files] == [True, True]


def test_text_is_json() -> None:
    with upload_body(None, "Answer briefly.") as body:
        assert body == {"json": {"text": "Answer briefly."}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no adapter_config.json and no adapter_model.safetensors"),
        (("adapter_model.safetensors",), "no adapter_config.json:"),
        (("adapter_config.json", "adapter_model.bin"), "a pickle.*safe_serialization=True"),
    ],
)
def test_a_folder_that_is_no_adapter(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(PrefixFileError, match=message):
        parts(adapter(tmp_path, *names))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match=r"cannot read .*x: No such file"):
        parts(tmp_path / "x")


def test_nothing_or_too_much_to_send() -> None:
    with pytest.raises(InvalidArgumentError, match="upload takes"):
        parts(None)
    with pytest.raises(InvalidArgumentError, match="upload takes"):
        parts(b"tensors", "text")
