"""`python -m tools.bundle.prove`: installs the bundle without a network and uses every command, as a user would.

All of it runs in a network namespace without interfaces (`unshare` of util-linux), from a read-only mount, with a fresh home and
none of this shell's environment. Prints a line per step; the first failure ends it with what the step printed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import pty
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tools.bootstrap import ROOT

STEP_TIMEOUT_S = 900
SCREEN = (80, 24)
QUESTION, ANSWER = "What is 2 plus 2?", "2 + 2 = 4"


class ProofError(Exception):
    """A step did not do what it should; the second argument is what it printed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bundle.prove", description=__doc__)
    parser.add_argument("tar", nargs="?", type=Path, help="the bundle (default: the newest in dist/)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.inside is not None:
            Proof(args.inside).run()
            return 0
        return outside(args.tar)
    except ProofError as error:
        print(f"FAILED: {error.args[0]}\n{error.args[1]}", file=sys.stderr)
        return 1


def outside(tar: Path | None) -> int:
    """Unpacks the bundle and starts this program again in the namespace."""
    tars = sorted((ROOT / "dist").glob("localrun-*.tar"), key=lambda path: path.stat().st_mtime)
    if tar is None and not tars:
        raise ProofError("there is no bundle", "make bundle")
    if shutil.which("unshare") is None:
        raise ProofError("no unshare program", "install util-linux")
    with tempfile.TemporaryDirectory(prefix="localrun-proof-") as folder:
        work = Path(folder)
        with tarfile.open(tar or tars[-1]) as archive:
            archive.extractall(work / "media", filter="data")
        (work / "home").mkdir()
        # Root needs no user namespace, everybody else gets one with it.
        unshare = ["unshare", "--net", "--mount"] + ([] if os.getuid() == 0 else ["--map-root-user"])
        environment = {"HOME": str(work / "home"), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "xterm-256color"}
        environment |= {"TMPDIR": str(work), "PYTHONPATH": str(ROOT)}
        command = [*unshare, sys.executable, "-m", "tools.bundle.prove", "--inside", str(work)]
        return subprocess.run(command, cwd=work, env=environment).returncode


class Proof:
    """All steps, in a work folder with `media` (the unpacked bundle) and `home`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.prefix = work / "prefix"
        self.localrun = str(self.prefix / "bin" / "localrun")
        self.model = work / "model"
        self.started = time.monotonic()
        # What a user's shell would have.
        self.environment = {k: v for k, v in os.environ.items() if k in ("HOME", "PATH", "LANG", "TERM", "TMPDIR")}

    def run(self) -> None:
        self.check_namespace()
        read_only(self.work / "media")
        (script,) = (self.work / "media").glob("*/install.sh")
        self.step("install", "sh", str(script), str(self.prefix))
        doctor = self.step("doctor", self.localrun, "doctor")
        self.expect("FAIL" not in doctor, "doctor reports failures", doctor)
        answer = self.step("run (the demo model)", self.localrun, "run", "-p", QUESTION, "--temp", "0")
        self.expect(ANSWER in answer, f"the answer is not {ANSWER!r}", answer)
        checkpoint = self.step("demo", str(self.prefix / "bin/python"), "-I", "-c", _WHERE_IS_THE_DEMO).strip()
        self.step("convert", self.localrun, "convert", checkpoint, str(self.model))
        read_only(self.model)
        self.step("verify (read-only)", self.localrun, "verify", str(self.model))
        options = ["--prompt-tokens", "64", "--new-tokens", "8", "--json"]
        json.loads(self.step("bench (read-only)", self.localrun, "bench", str(self.model), *options))
        self.chat()
        self.check_removal()

    def check_namespace(self) -> None:
        names = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
        self.expect(names == ["lo"], "there are network interfaces", str(names))
        for address in ("127.0.0.1", "192.0.2.1"):
            with socket.socket() as probe:
                code = probe.connect_ex((address, 9))
                self.expect(code == errno.ENETUNREACH, f"{address} can be reached", os.strerror(code))
        self.say("no network: no interface but lo, which is down")

    def step(self, what: str, *command: str) -> str:
        """Runs a command of the installation; returns its standard output."""
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=self.work / "home", env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=STEP_TIMEOUT_S,
        )  # fmt: skip
        output, errors = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        self.expect(done.returncode == 0, f"{what}: exit code {done.returncode}", output + errors)
        self.say(f"{what}: {time.monotonic() - start:.1f} s")
        return output

    def chat(self) -> None:
        """Asks in the terminal UI and waits for the answer; in tmux, or in a plain pseudo-terminal where there is none."""
        start = time.monotonic()
        command = [self.localrun, "chat", str(self.model), "--temp", "0"]
        terminal = Tmux(command, self) if shutil.which("tmux") else PseudoTerminal(command, self)
        try:
            terminal.wait_for("ctx 0/")
            terminal.type(QUESTION + "\r")
            terminal.wait_for(ANSWER)
            terminal.type("\x11")
            terminal.wait_for_end()
        finally:
            terminal.close()
        self.say(f"chat ({type(terminal).__name__}): {time.monotonic() - start:.1f} s")

    def check_removal(self) -> None:
        shutil.rmtree(self.prefix)
        home = self.work / "home"
        left = {str(path.relative_to(home)) for path in home.glob("*/*")} | {path.name for path in home.glob("[!.]*")}
        own = {".cache/localrun", ".local/share"}
        self.expect(left <= own, "something was left outside the prefix", str(left - own))
        self.say(f"removed; the user's own files are in {', '.join(sorted(left))}")

    def expect(self, condition: bool, problem: str, detail: str) -> None:
        if not condition:
            raise ProofError(problem, detail)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)


_WHERE_IS_THE_DEMO = "from localrun.demo import checkpoint_dir; print(checkpoint_dir())"


def read_only(folder: Path) -> None:
    """Mounts a folder over itself, read-only: what a USB stick or a DVD is."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "--options", "remount,bind,ro", str(folder)], check=True)
    try:
        (folder / "probe").touch()
    except OSError as error:
        if error.errno == errno.EROFS:
            return
        raise
    raise ProofError(f"{folder} is not read-only", "")


class Tmux:
    """A program in tmux: the screen as a person sees it."""

    def __init__(self, command: list[str], proof: Proof) -> None:
        self._proof = proof
        self._socket = str(proof.work / "tmux")
        size = ["-x", str(SCREEN[0]), "-y", str(SCREEN[1])]
        # The exit code outlives the program's own screen.
        shell = f"{shlex.join(command)}; echo exit code $?; exec sleep {STEP_TIMEOUT_S}"
        self._tmux("-f", os.devnull, "new-session", "-d", *size, shell)

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", self._socket, *arguments]
        done = subprocess.run(command, env=self._proof.environment, capture_output=True, text=True, check=True)
        return done.stdout

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while text not in (screen := self._tmux("capture-pane", "-p")):
            self._proof.expect(
                time.monotonic() < deadline and "exit code" not in screen, f"chat: no {text!r} on the screen", screen
            )
            time.sleep(0.2)

    def wait_for_end(self) -> None:
        deadline = time.monotonic() + 30
        while "exit code" not in (screen := self._tmux("capture-pane", "-p")):
            self._proof.expect(time.monotonic() < deadline, "chat does not end", screen)
            time.sleep(0.2)
        self._proof.expect("exit code 0" in screen, "chat failed", screen)

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True)


class PseudoTerminal:
    """A program in a pseudo-terminal: what it wrote, not what a person would see of it."""

    def __init__(self, command: list[str], proof: Proof) -> None:
        self._proof = proof
        self._output = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            size = {"COLUMNS": str(SCREEN[0]), "LINES": str(SCREEN[1])}
            os.execve(command[0], command, {**proof.environment, **size})

    def type(self, text: str) -> None:
        self._output = ""
        os.write(self._terminal, text.encode())

    def _read(self) -> bool:
        """Takes what has been written; False when the program has ended."""
        if select.select([self._terminal], [], [], 0.2)[0]:
            try:
                self._output += os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:
                return False
        return True

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while text not in self._output:
            alive = self._read() and time.monotonic() < deadline
            self._proof.expect(alive, f"chat: no {text!r}", self._output[-4000:])

    def wait_for_end(self) -> None:
        while self._read():
            pass
        _, status = os.waitpid(self._pid, 0)
        self._proof.expect(os.waitstatus_to_exitcode(status) == 0, "chat failed", self._output[-4000:])

    def close(self) -> None:
        os.close(self._terminal)


if __name__ == "__main__":
    sys.exit(main())
