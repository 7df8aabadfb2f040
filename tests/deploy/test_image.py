"""The Dockerfile, as far as can be known without Docker: lint, what it names, and its own steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.settings import ENV_PREFIX, Settings
from tests.server_process import ServerProcess, free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"


@dataclass(frozen=True)
class Stage:
    """One `FROM` and what follows it."""

    base: str
    name: str
    instructions: list[tuple[str, str]]

    def all(self, kind: str) -> list[str]:
        """The arguments of its instructions of a kind."""
        return [rest for word, rest in self.instructions if word == kind]


def stages() -> dict[str, Stage]:
    """The stages by name, the last one as ''."""
    found: dict[str, Stage] = {}
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(base, name, [])
        elif word and found:
            [*found.values()][-1].instructions.append((word, rest.strip()))
    return found


STAGES = stages()


def test_hadolint_has_nothing_to_say() -> None:
    finished = subprocess.run(
        [str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_stage_it_builds_on_is_there() -> None:
    for accelerator in ("cpu", "cuda"):
        assert STAGES["build"].base.replace("${ACCELERATOR}", accelerator) in STAGES
    for stage in STAGES.values():
        if "ACCELERATOR" not in stage.base:
            assert stage.base in STAGES or stage.base.startswith("python:3.11-")


def test_every_file_it_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [
        source
        for stage in STAGES.values()
        for rest in stage.all("COPY")
        if "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert {"server", "prefix_store", "clients", "pyproject.toml"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert set(copied).isdisjoint(ignored)


def test_it_runs_as_a_number_that_is_not_root() -> None:
    [user] = STAGES[""].all("USER")
    assert int(user) > 0


def test_the_libraries_that_the_kernels_load_are_installed() -> None:
    [kernels] = (ROOT / "server" / "engine" / "kernels").glob("_kernels*.so")
    finished = subprocess.run(["ldd", str(kernels)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"^\s+(lib\w+)\.so", finished.stdout, re.MULTILINE))
    with_debian_slim = {"libc", "libm", "libpthread", "libdl"}
    packages = {f"{name}1" for name in needed - with_debian_slim}
    assert packages <= set(re.findall(r"\w+", STAGES[""].all("RUN")[0]))


def environment(stage: Stage) -> dict[str, str]:
    """What a stage's ENV sets."""
    return dict(pair.split("=", 1) for rest in stage.all("ENV") for pair in rest.split())


def test_its_settings_are_the_servers() -> None:
    names = [name for name in environment(STAGES[""]) if name.startswith(ENV_PREFIX)]
    assert names
    for name in names:
        assert name.removeprefix(ENV_PREFIX).lower() in Settings.model_fields


def run_steps(stage: Stage, folder: Path, **variables: str) -> None:
    """The files that a stage copies and the commands that it runs, in `folder/src`."""
    source, venv = folder / "src", folder / "venv"
    source.mkdir(exist_ok=True)
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    for word, rest in stage.instructions:
        if word == "COPY":
            for name in rest.split()[:-1]:
                copy(ROOT / name, source / name)
        elif word == "RUN":
            # Debian's packages are there or not; this is about what comes after.
            command = re.sub(r"^apt-get update.*?/var/lib/apt/lists/\* *&& ", "", rest)
            finished = subprocess.run(
                ["/bin/sh", "-euc", command.replace("/opt/venv", str(venv))],
                cwd=source,
                env={**os.environ, "PATH": path, **variables},
                capture_output=True,
                text=True,
                check=False,
            )
            assert finished.returncode == 0, f"{command}\n{finished.stdout}{finished.stderr}"


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, target, ignore=ignored)
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean virtual environment after the build's own steps.

    All but one: the dependencies' gigabytes are lent by the environment of these tests, which has
    the same versions. And there is no compiler, for the minutes that the kernels take: that they
    build, this environment shows.
    """
    folder = tmp_path_factory.mktemp("image")
    for stage in (STAGES["base"], STAGES["build"]):
        steps = [step for step in stage.instructions if "--constraint" not in step[1]]
        run_steps(Stage("", "", steps), folder, CC="false")
    [site] = (folder / "venv" / "lib").glob("python*/site-packages")
    lent = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (site / "lent.pth").write_text(f"{lent}\n")
    return folder


def test_the_lock_pins_all_that_it_installs(installed: Path) -> None:
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(
            r"^([\w.-]+)==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE
        )
    }
    waiting = [*map(Requirement, (installed / "src" / "runtime.txt").read_text().splitlines())]
    assert "torch" in {requirement.name for requirement in waiting}
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == "setuptools":  # a part of the environment, which `pip freeze` leaves out
            continue
        assert requirement.specifier.contains(pins[name]), requirement
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            extras = requirement.extras or {""}
            wanted = any(
                needed.marker is None or needed.marker.evaluate({"extra": extra})
                for extra in extras
            )
            if wanted and (name, text) not in seen:
                seen.add((name, text))
                waiting.append(needed)


def test_what_it_builds_is_whole(installed: Path) -> None:
    [site] = (installed / "venv" / "lib").glob("python*/site-packages")
    for package in ("server", "prefix_store", "clients"):
        files = [
            path.relative_to(ROOT)
            for pattern in ("*.py", "*.html", "*.safetensors", "*.txt", "*.h")
            for path in (ROOT / package).rglob(pattern)
        ]
        assert [path for path in files if not (site / path).is_file()] == []


def start(argument: str, installed: Path, log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """What a CMD or a HEALTHCHECK says, as the image would start it."""
    command = json.loads(argument)
    if command[0] != "python":
        command = json.loads(STAGES[""].all("ENTRYPOINT")[0]) + command
    program = installed / "venv" / "bin" / command[0]
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(program), *command[1:]], cwd="/", env=variables, stdout=output, stderr=output
        )


def test_what_it_installs_serves_and_its_health_check_sees_it(
    installed: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    port, log = str(free_port()), tmp_path / "log"
    [command], [check] = STAGES[""].all("CMD"), STAGES[""].all("HEALTHCHECK")
    check = check[check.index("[") :].replace(":8000", f":{port}")
    variables = {
        **environment(STAGES[""]),
        "PATH": "/usr/bin:/bin",
        "PREFIXSERVE_DATA_DIR": str(tmp_path),
        "PREFIXSERVE_HOST": "127.0.0.1",
        "PREFIXSERVE_PORT": port,
        "PREFIXSERVE_MODEL": str(tiny_llama_dir),
        "OMP_NUM_THREADS": "1",
    }
    assert start(check, installed, log, **variables).wait(30) != 0
    server = start(command, installed, log, **variables)
    try:
        wait_until_ready(ServerProcess(f"http://127.0.0.1:{port}", server, log, tmp_path))
        assert start(check, installed, log, **variables).wait(30) == 0
    finally:
        server.terminate()
        code = server.wait(60)
    assert code == 0
