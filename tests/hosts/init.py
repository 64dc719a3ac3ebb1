"""Process 1 of a test host: set up the host's files and its sshd, then reap orphans until it is killed.

    python init.py STATE NAME        (in namespaces of its own: net, uts, ipc, pid, mount)
"""

import os
import signal
import subprocess
import sys
from pathlib import Path


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def main(state: Path, name: str) -> None:
    own = state / name
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "proc", "proc", "/proc")
    run("hostname", name)
    run("ip", "link", "set", "lo", "up")
    for file, target in (("hosts", "/etc/hosts"), ("ssh_config", "/etc/ssh/ssh_config"), ("bashrc", "/root/.bashrc")):
        if Path(target).exists():
            run("mount", "--bind", str(own / file), target)
    (own / "site").mkdir()
    run("mount", "--bind", str(own / "site"), str(state / "site"))
    for target, size in (("/dev/shm", "1g"), ("/run", "16m"), (str(state / "scratch"), "64m")):
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", target)
    os.mkdir("/run/sshd", 0o755)
    os.mkdir(state / "scratch" / "tmp")
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(own / "sshd_config")], stdin=subprocess.DEVNULL)
    (own / "up").touch()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.pause()


main(Path(sys.argv[1]), sys.argv[2])
