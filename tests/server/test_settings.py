"""Where a setting comes from, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import StartupError
from server.settings import Settings, load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('max_slots = 3\nport = 1111\nmodel = "from-file"\n')
    return path


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXSERVE_PORT", "2222")
    monkeypatch.setenv("PREFIXSERVE_MODEL", "from-variable")
    settings = load_settings(["--config", str(config), "--model", "from-flag"])
    assert (settings.model, settings.port, settings.max_slots) == ("from-flag", 2222, 3)
    assert settings.host == "127.0.0.1"


def test_a_variable_can_name_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXSERVE_CONFIG", str(config))
    assert load_settings([]).max_slots == 3


def test_sizes_take_units_and_flags_can_be_negated() -> None:
    settings = load_settings(["--prefix-cache-bytes", "3MiB", "--no-demo-tasks"])
    assert (settings.prefix_cache_bytes, settings.demo_tasks) == (3 * 2**20, False)


def test_help_explains_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_settings(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description is not None
        assert field.description in shown
    assert "(default: 64)" in shown
    assert "(default: 1GiB)" in shown


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-slots", "0"], ["--max-slots", "PREFIXSERVE_MAX_SLOTS", "equal to 1", "'0'"]),
        (["--port", "http"], ["--port", "'http'"]),
        (["--redis-url", "localhost:6379"], ["--redis-url", "redis"]),
        (["--drain-seconds", "nan"], ["--drain-seconds", "finite"]),
        (["--prefix-cache-bytes", "lots"], ["--prefix-cache-bytes", "'lots'"]),
        (["--dtype", "int4"], ["--dtype", "float32"]),
        (["--config", "/nowhere.toml"], ["/nowhere.toml"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_expected(argv: list[str], words: list[str]) -> None:
    with pytest.raises(StartupError) as caught:
        load_settings(argv)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_password_in_a_bad_address_is_not_repeated() -> None:
    with pytest.raises(StartupError) as caught:
        load_settings(["--redis-url", "http://:hunter2@host"])
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(load_settings(["--redis-url", "redis://:hunter2@host"]))


def test_an_unknown_line_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("max_slot = 3\n")
    with pytest.raises(StartupError, match="max_slot"):
        load_settings(["--config", str(path)])


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("max_slots: 3\n")
    with pytest.raises(StartupError, match="cannot read the settings file"):
        load_settings(["--config", str(path)])


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "192.0.2.1", "server.example.com", "127.0.0.1.x"],  # noqa: S104
)
def test_no_authentication_on_the_network_is_refused_unless_it_is_meant(host: str) -> None:
    flags = ["--host", host, "--no-auth"]
    with pytest.raises(StartupError, match="--allow-unauthenticated") as refusal:
        load_settings(flags)
    assert host in str(refusal.value)
    assert not load_settings([*flags, "--allow-unauthenticated"]).auth
    assert load_settings(["--host", host]).auth


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_authentication_may_be_off_on_this_machine_only(host: str) -> None:
    assert not load_settings(["--host", host, "--no-auth"]).auth
