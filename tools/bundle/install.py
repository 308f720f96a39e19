"""Installs a bundle into its own folder and tests it. Started by install.sh after the checksums were verified.

Standard library only; runs on the Python that localrun will use. Writes nothing outside PREFIX but compiled kernels, which go to
the user's cache as in daily use.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

MARKER = Path("share", "localrun", "bundle.json")
QUESTION = "What is 2 plus 2?"


class InstallError(Exception):
    """Something that the user has to mend; the second argument says how."""


def main(bundle: Path, prefix: Path) -> int:
    made = False
    try:
        facts = json.loads((bundle / "bundle.json").read_text())
        check_machine(facts)
        was_there = check_prefix(prefix)
        start = time.monotonic()
        made = not was_there
        install(bundle, prefix)
        self_test(prefix)
    except (InstallError, OSError, KeyboardInterrupt) as error:
        if made:
            shutil.rmtree(prefix, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            print("\ninterrupted; nothing was installed", file=sys.stderr)
            return 130
        message, hint = error.args if isinstance(error, InstallError) else (str(error), "mend this and start again")
        print(f"error: {message}\nhint: {hint}", file=sys.stderr)
        return 1
    say(f"localrun {facts['localrun']} is installed and works ({time.monotonic() - start:.0f} s)")
    say(f"start it:   {prefix / 'bin' / 'localrun'} chat")
    say(f"remove it:  rm -r {prefix}")
    return 0


def check_machine(facts: dict) -> None:  # type: ignore[type-arg]
    """Refuses a machine that the wheels are not for."""
    here = (sys.platform, platform.machine())
    if here != (facts["system"], facts["machine"]):
        raise InstallError(
            f"this bundle is for {facts['system']} on {facts['machine']}, this machine is {here[0]} on {here[1]}",
            "make a bundle on a machine of this kind",
        )
    version = "{}.{}".format(*sys.version_info[:2])
    if version not in facts["pythons"]:
        raise InstallError(
            f"{sys.executable} is Python {version}, this bundle has wheels for {', '.join(facts['pythons'])}",
            "name another: PYTHON=/path/to/python3 sh install.sh PREFIX",
        )
    name, glibc = platform.libc_ver()
    needed = tuple(map(int, facts["glibc"].split(".")))
    if name != "glibc" or tuple(map(int, glibc.split(".")[:2])) < needed:
        raise InstallError(
            f"this system's C library is {name or 'not glibc'} {glibc}, the bundle needs glibc {facts['glibc']} or newer",
            "make a bundle on an older system, or use a newer one",
        )


def check_prefix(prefix: Path) -> bool:
    """Whether an installation is there already, which is then replaced.

    Raises:
        InstallError: the folder holds something else.
    """
    if not prefix.exists() or (prefix.is_dir() and not any(prefix.iterdir())):
        return False
    if not prefix.is_dir() or not (prefix / MARKER).is_file():
        raise InstallError(f"{prefix} exists and is no installation of localrun", "name a new folder")
    return True


def install(bundle: Path, prefix: Path) -> None:
    """A virtual environment without pip, filled by the bundle's pip with the bundle's wheels and nothing else."""
    say(f"installing into {prefix}")
    (prefix / "share").mkdir(parents=True, exist_ok=True)
    if not os.access(prefix, os.W_OK):
        raise InstallError(f"{prefix}: not writable", "name a folder of your own")
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(prefix)
    version = "{}.{}".format(*sys.version_info[:2])
    (pip,) = (bundle / "installer").glob("pip-*.whl")
    options = ["--no-index", "--no-deps", "--require-hashes", "--no-cache-dir", "--no-input"]
    options += ["--disable-pip-version-check", "--quiet", "--find-links", str(bundle / "wheels")]
    requirements = bundle / "requirements" / f"{version}.txt"
    run_pip(prefix, pip, ["install", *options, "--requirement", str(requirements)])
    run_pip(prefix, pip, ["check"])
    provide_libraries(bundle, prefix)
    share = prefix / MARKER.parent
    share.mkdir(parents=True, exist_ok=True)
    shutil.copytree(bundle / "licenses", share / "licenses", dirs_exist_ok=True)
    shutil.copyfile(bundle / "bundle.json", prefix / MARKER)


def run_pip(prefix: Path, pip: Path, arguments: list[str]) -> None:
    """Runs the bundle's pip, from its wheel, in the new environment; the user's pip settings and proxies do not count."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('pip', run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    environment["PIP_CONFIG_FILE"] = os.devnull
    command = [str(prefix / "bin" / "python"), "-I", "-c", code, str(pip), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise InstallError(f"pip {arguments[0]} failed (see above)", "send this to whoever made the bundle")


LOAD = "import numpy; from localrun.ggml import library; library.library(); import ctypes; ctypes.CDLL('libgomp.so.1')"

PRELOAD = """\
import ctypes
import os

_FOLDER = os.path.join(os.path.dirname(__file__), "gcc_runtime")
for _name in ("libgcc_s.so.1", "libstdc++.so.6", "libgomp.so.1"):
    if os.path.exists(os.path.join(_FOLDER, _name)):
        ctypes.CDLL(os.path.join(_FOLDER, _name), ctypes.RTLD_GLOBAL)
"""
"""Loads the libraries when Python starts: whatever needs one of these names later, numpy first of all, gets them."""


def provide_libraries(bundle: Path, prefix: Path) -> None:
    """Uses the bundle's copies of GCC's libraries where the system has none, or too old ones."""
    command = [str(prefix / "bin" / "python"), "-I", "-c", LOAD]
    first = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if first.returncode == 0:
        return
    (packages,) = prefix.glob("lib/python*/site-packages")
    shutil.copytree(bundle / "runtime", packages / "gcc_runtime")
    (packages / "_gcc_runtime.py").write_text(PRELOAD)
    (packages / "_gcc_runtime.pth").write_text("import _gcc_runtime\n")
    second = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if second.returncode:
        print(second.stdout, file=sys.stderr)
        raise InstallError(
            "numpy or llama.cpp can't be loaded (see above)", "install this system's libstdc++ and libgomp"
        )
    say("this system lacks libstdc++ or libgomp, or has old ones: the bundle's are used")


def self_test(prefix: Path) -> None:
    """Converts the demo checkpoint, answers a question, verifies the result."""
    folder = prefix / "self-test"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LOCALRUN_"))}
    environment |= {"LOCALRUN_CONFIG_DIR": str(folder / "config"), "LOCALRUN_DATA_DIR": str(folder / "data")}
    for name in ("LOCALRUN_CACHE_DIR", "LOCALRUN_KERNEL_DIR"):
        if name in os.environ:
            environment[name] = os.environ[name]

    def step(what: str, *command: str) -> str:
        say(what)
        arguments = [str(prefix / "bin" / command[0]), *command[1:]]
        done = subprocess.run(arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        output, errors = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        if done.returncode:
            print(output + errors, file=sys.stderr)
            raise InstallError(f"the self-test failed: {what}", "send the lines above to whoever made the bundle")
        return output.strip()

    try:
        code = "from localrun.demo import checkpoint_dir; print(checkpoint_dir())"
        checkpoint = step("self-test: the demo model", "python", "-I", "-c", code)
        step("self-test: convert", "localrun", "convert", checkpoint, "model")
        options = ["--temp", "0", "--max-tokens", "32", "--context", "512"]
        answer = step(
            "self-test: answer (compiles kernels for this processor, a minute or two)",
            *("localrun", "run", "model", "-p", QUESTION, *options),
        )
        if not answer:
            raise InstallError("the self-test failed: the demo model said nothing", "run localrun doctor")
        say(f"self-test: {QUESTION} {answer.splitlines()[0][:200]!r}")
        step("self-test: verify", "localrun", "verify", "model")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]).expanduser().resolve()))
