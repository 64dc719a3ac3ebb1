"""The supervisor with real processes that write the records of ranks, and a rank's side of the heartbeat."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prelora_ds.errors import ConfigError, LaunchError
from prelora_ds.hosts.diagnosis import aborted_ranks, diagnose, hostfile_name, is_echo
from prelora_ds.hosts.heartbeat import HEARTBEAT_FILE, LOCK_FILE, AttemptRecord, read_json, write_json
from prelora_ds.hosts.hostfile import Host
from prelora_ds.hosts.lock import Lock
from prelora_ds.hosts.supervisor import Policy, Supervisor, check_policy, substitute

HOSTS = [Host("a", 2), Host("b", 2), Host("c", 2)]
# A fake launcher with the arguments HOSTS... --supervised FOLDER. `die CODE HOST WHY` writes exit records of ranks.
LAUNCHER = """
own="${@: -1}"; attempt="${own##*-}"; hosts="$1"
mark() { touch "$own/$1"; }
die() {
    for rank in 0 1 2 3; do echo "{\\"rank\\": $rank, \\"host\\": \\"$2\\"}" > "$own/rank-$rank.json"; done
    for rank in 0 1 2 3; do
        echo "{\\"rank\\": $rank, \\"host\\": \\"$2\\", \\"code\\": $1, \\"why\\": \\"$3\\"}" > "$own/exit-$rank.json"
    done
    exit "$1"
}
"""


class World:
    """A shared folder, hosts that respond as long as their file exists, and the lines that the supervisor printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said, self.checkpoints = folder, list[str](), 0
        for host in HOSTS:
            (folder / host.name).touch()

    def supervisor(self, script: str, *, ranks: tuple[int, ...] = (4,), **policy) -> Supervisor:
        (self.folder / "launcher").write_text(LAUNCHER + script)
        chosen = Policy(**({"nodes": 2, "min_nodes": 2, "grace_s": 0.3, "patience_s": 0.3, "probe_s": 60.0,
                            "probe": f"test -e {self.folder}/{{host}}"} | policy))
        return Supervisor(["bash", str(self.folder / "launcher"), "{nodelist}"], HOSTS, self.folder / "out", chosen,
                          lambda: self.checkpoints, lambda n: n in ranks, self.said.append)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("prelora_ds.hosts.supervisor.TICK_S", 0.05)
    monkeypatch.setattr("prelora_ds.hosts.supervisor.FENCE_S", 0.1)
    return World(tmp_path)


def attempts(world: World) -> list[str]:
    return [line.partition("hosts: ")[2] for line in world.said if "hosts: " in line and line.startswith("attempt")]


def test_the_mark_on_disk_decides_not_the_exit_code(world: World) -> None:
    assert world.supervisor("mark DONE; exit 7").run() == 0
    assert world.supervisor("mark STOPPED; exit 0").run() == 99


def test_exit_code_0_without_a_mark_is_a_failure_and_the_same_failure_twice_ends_the_run(world: World) -> None:
    assert world.supervisor("echo all is well; exit 0").run() == 75
    assert len(attempts(world)) == 2
    assert "the same failure twice" in world.said[-1] and "all is well" in world.said[-2]


def test_a_failed_host_is_replaced_by_the_spare_and_the_next_attempt_may_succeed(world: World) -> None:
    assert world.supervisor('[ "$attempt" = 2 ] && mark DONE && exit 0; die 1 a "disk on fire"').run() == 0
    assert attempts(world) == ["a, b", "b, c"]
    assert any("attempt 1 failed on a (exit code 1): rank 0: disk on fire" in line for line in world.said)
    assert read_json(world.folder / "out" / "attempt-1" / "failure.json")["hosts"] == ["a"]


def test_restarts_are_bounded_even_with_progress(world: World) -> None:
    supervisor = world.supervisor("die 85 a hung", max_restarts=3)
    progress = iter(range(100))
    supervisor.progress = lambda: next(progress)
    assert supervisor.run() == 85
    assert len(attempts(world)) == 4 and "giving up after 3 restarts" in world.said[-1]


def test_a_usage_error_is_not_retried(world: World) -> None:
    assert world.supervisor("die 2 a 'no such recipe'").run() == 2
    assert len(attempts(world)) == 1


def test_unreachable_hosts_are_not_used_and_too_few_hosts_are_an_error(world: World) -> None:
    (world.folder / "a").unlink()
    assert world.supervisor("mark DONE").run() == 0
    assert attempts(world) == ["b, c"] and "host a does not respond" in world.said
    (world.folder / "b").unlink()
    with pytest.raises(LaunchError, match="only 1 of 3 hosts respond, 2 needed; unreachable: a, b"):
        world.supervisor("mark DONE").run()


def test_a_run_continues_with_fewer_hosts_only_if_the_batch_divides(world: World) -> None:
    (world.folder / "a").unlink()
    (world.folder / "b").unlink()
    assert world.supervisor("mark DONE", ranks=(2, 4), min_nodes=1).run() == 0
    assert attempts(world) == ["c"]
    with pytest.raises(LaunchError):
        world.supervisor("mark DONE", ranks=(4,), min_nodes=1).run()


def test_a_launcher_that_hangs_after_a_rank_ended_is_killed(world: World) -> None:
    begun = time.monotonic()
    script = """trap '' TERM; [ "$attempt" = 2 ] && mark DONE; (die 1 b x); sleep 60"""
    assert world.supervisor(script).run() == 0
    assert time.monotonic() - begun < 20


def test_ranks_whose_launcher_was_killed_get_the_grace_period_to_save(world: World) -> None:
    script = """
    [ "$attempt" = 2 ] && mark DONE && exit
    ( trap 'sleep 0.3; mark STOPPED; exit 99' TERM; mark trapped; while :; do sleep 0.05; done ) &
    while [ ! -e "$own/trapped" ]; do sleep 0.05; done
    kill -KILL $$"""
    assert world.supervisor(script, grace_s=5.0).run() == 0
    assert (world.folder / "out" / "attempt-1" / "STOPPED").exists()
    assert any(line.startswith("attempt 1 failed on a, b (exit code 75)") for line in world.said)


def test_a_run_that_orphaned_ranks_stopped_is_restarted(world: World) -> None:
    script = """[ "$attempt" = 2 ] && mark DONE && exit; mark STOPPED; die 87 b "the launcher is gone" """
    assert world.supervisor(script).run() == 0
    assert any("attempt 1 failed (exit code 87): the launcher is gone" in line for line in world.said)


def test_an_attempt_with_a_process_that_ignores_sigterm_is_bounded(world: World) -> None:
    script = """( trap '' TERM; sleep 60 ) & [ "$attempt" = 2 ] && mark DONE; die 1 b x"""
    begun = time.monotonic()
    assert world.supervisor(script).run() == 0
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("change", [{"command": ["/nowhere/launcher"]}, {"policy": Policy(2, 2, probe="'")}])
def test_a_command_that_cannot_be_started_is_a_config_error(world: World, change: dict) -> None:
    with pytest.raises(ConfigError, match=r"COMMAND = '/nowhere/launcher': cannot be started|--probe = "):
        replace(world.supervisor("mark DONE"), **change).run()


def test_a_folder_that_cannot_be_written_is_a_launch_error(world: World) -> None:
    (world.folder / "out").touch()
    with pytest.raises(LaunchError, match="out cannot be written"):
        world.supervisor("mark DONE").run()


@pytest.mark.parametrize("record", [{"code": "x"}, {"code": 1, "blames": 7}, {"rank": []}])
def test_a_record_with_other_content_counts_as_unreadable(tmp_path: Path, record: dict) -> None:
    write_exits(tmp_path / "attempt-1", record)
    assert "a record cannot be read" in diagnose(tmp_path / "attempt-1", 1, HOSTS, [], set()).why


def test_a_folder_next_to_the_attempts_is_not_counted_as_an_attempt(world: World) -> None:
    for name in ("attempt-2", "attempt-7.bak", "attempt-", "attempt-x", "old"):
        (world.folder / "out" / name).mkdir(parents=True)
    assert world.supervisor("mark DONE").run() == 0
    assert (world.folder / "out" / "attempt-3" / "DONE").exists()


def test_a_host_that_becomes_unreachable_ends_the_attempt(world: World) -> None:
    script = f'[ "$attempt" = 2 ] && mark DONE && exit; rm {world.folder}/b; sleep 60'
    assert world.supervisor(script, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, b", "a, c"]
    assert any("attempt 1 failed on b (exit code 75): host b does not respond" in line for line in world.said)


def test_the_launcher_gets_hostfile_environment_and_replaced_placeholders(world: World) -> None:
    script = 'echo "$DS_ENV_FILE $MASTER_ADDR $MASTER_PORT $hosts"; mark DONE'
    assert world.supervisor(script, interface="eth0").run() == 0
    attempt_dir = world.folder / "out" / "attempt-1"
    assert (attempt_dir / "launcher.log").read_text().split() == [str(attempt_dir / "ds_env"), "a", "29501", "a,b"]
    assert (attempt_dir / "hostfile").read_text() == "a slots=2\nb slots=2\n"
    assert "GLOO_SOCKET_IFNAME=eth0\n" in (attempt_dir / "ds_env").read_text()
    assert substitute("{a}:{b}{c}", {"a": "1", "b": "2"}) == "1:2{c}"


def test_hosts_that_respond_again_within_the_patience_are_used(world: World) -> None:
    """A restarting scheduler answers no probe for a while."""
    for host in HOSTS:
        (world.folder / host.name).unlink()
    back = threading.Timer(0.5, lambda: [(world.folder / name).touch() for name in "ac"])
    back.start()
    assert world.supervisor("mark DONE", patience_s=20.0, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, c"] and world.said[:3] == [f"host {name} does not respond" for name in "abc"]


def test_a_round_of_probes_without_any_response_does_not_end_a_healthy_run(world: World) -> None:
    script = f'rm {world.folder}/[abc]; sleep 1; touch {world.folder}/{{a,b,c}}; sleep 0.5; mark DONE'
    assert world.supervisor(script, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, b"]


def test_a_run_survives_when_only_the_supervisors_own_host_responds(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.supervisor.is_mine", lambda name: name == "a")
    script = f'rm {world.folder}/[bc]; sleep 1; touch {world.folder}/{{b,c}}; sleep 0.5; mark DONE'
    assert world.supervisor(script, probe_s=0.1, nodes=3, min_nodes=3, ranks=(6,)).run() == 0
    assert attempts(world) == ["a, b, c"]


def test_a_probe_that_cannot_fork_does_not_count_against_the_host(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object, **options: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    supervisor = world.supervisor("mark DONE")
    with monkeypatch.context() as system:
        system.setattr("prelora_ds.hosts.supervisor.subprocess.Popen", none_left)
        assert supervisor._unreachable(HOSTS) == []
    with pytest.raises(ConfigError, match="cannot be started"):
        world.supervisor("mark DONE", probe="/nowhere {host}").run()


def test_fewer_hosts_are_used_only_if_the_others_stay_unreachable(world: World) -> None:
    (world.folder / "b").unlink()
    (world.folder / "c").unlink()
    threading.Timer(0.5, (world.folder / "c").touch).start()
    assert world.supervisor("mark DONE", ranks=(2, 4), min_nodes=1, patience_s=20.0, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, c"]


def test_a_suspended_supervisor_leaves_the_run_to_its_successor(world: World) -> None:
    out = world.folder / "out"
    taken = json.dumps({"token": "new", "pid": 1, "host": "elsewhere"})
    newer = json.dumps({"attempt": 2})
    script = f"""
    echo '{taken}' > {out}/{LOCK_FILE}
    echo '{newer}' > {out}/{HEARTBEAT_FILE}
    sleep 0.5
    die 88 a fenced"""
    assert world.supervisor(script).run() == 88
    assert read_json(out / HEARTBEAT_FILE) == {"attempt": 2} and len(attempts(world)) == 1
    assert "taken over by process 1 on elsewhere" in world.said[-1]


def test_a_second_supervisor_is_refused_and_starts_no_attempt(world: World) -> None:
    (world.folder / "out").mkdir()
    first = Lock(world.folder / "out" / LOCK_FILE).take()
    with pytest.raises(LaunchError, match=r"is in use by process"):
        world.supervisor("mark DONE").run()
    assert not (world.folder / "out" / HEARTBEAT_FILE).exists() and not attempts(world)
    first.release()
    assert world.supervisor("mark DONE").run() == 0 and len(attempts(world)) == 1


def test_a_host_is_found_by_its_name_in_the_hostfile() -> None:
    full, short = [Host("n1.hsn.site", 4), Host("n2.hsn.site", 4)], [Host("n1", 4), Host("n2", 4)]
    assert hostfile_name("n2", 0, full) == "n2.hsn.site" and hostfile_name("n2.hsn.site", 0, short) == "n2"
    assert hostfile_name("n2", None, [*full, Host("n2.other", 4)]) == "n2", "two could be meant"
    addresses = [Host("10.0.0.1", 4), Host("10.0.0.2", 4)]
    assert hostfile_name("n2", 4, addresses) == "10.0.0.2" and hostfile_name("n2", 8, addresses) == "n2"
    assert hostfile_name("10.0.0.2", 0, addresses) == "10.0.0.2"


def write_exits(attempt_dir: Path, *records: dict) -> None:
    """Write exit records as ranks do, oldest first."""
    attempt_dir.mkdir()
    for number, record in enumerate(records):
        path = attempt_dir / f"exit-{record.get('rank', 'x')}.json"
        write_json(path, record)
        os.utime(path, (number, number))


TIMED_OUT = {"code": 75, "why": "ranks 2-3 of 4 did not check in within 9 s; present: ...", "blames": [2, 3]}
CANNOT_REACH = {"code": 75, "why": "host b (rank 2) could not reach rank 0 within 9 s", "blames": [0]}


def test_a_rank_that_timed_out_waiting_blames_the_host_of_the_missing_ranks(tmp_path: Path) -> None:
    write_exits(tmp_path / "1", {"rank": 1, "host": "a", **TIMED_OUT}, {"rank": 0, "host": "a", **TIMED_OUT})
    failure = diagnose(tmp_path / "1", 1, HOSTS[:2], [], {"a", "b"})
    assert failure.hosts == ["b"] and failure.code == 75 and failure.why.startswith("rank 0: ranks 2-3")
    write_exits(tmp_path / "2", {"rank": 2, "host": "b", **CANNOT_REACH})
    assert diagnose(tmp_path / "2", 1, HOSTS[:2], [], {"a", "b"}).hosts == ["a"], "it blames the host of rank 0"
    write_exits(tmp_path / "3", {"rank": 2, "host": "b", **CANNOT_REACH}, {"rank": 0, "host": "a", **TIMED_OUT})
    assert diagnose(tmp_path / "3", 1, HOSTS[:2], [], {"a", "b"}).hosts == ["b"], "rank 0 knows who is missing"
    write_exits(tmp_path / "4", {"rank": 0, "host": "a", **TIMED_OUT},
                {"rank": 2, "host": "b", "code": 1, "why": "no numpy"})
    assert diagnose(tmp_path / "4", 1, HOSTS[:2], [], set()).why == "rank 2: no numpy"
    write_exits(tmp_path / "5", {"rank": 0, "host": "a", **TIMED_OUT, "blames": [4, 5, 6]})
    assert diagnose(tmp_path / "5", 1, HOSTS[:2], [], {"a"}).hosts == [], "more ranks than the hostfile has slots"


def test_failures_that_differ_only_in_a_number_are_of_the_same_kind(tmp_path: Path) -> None:
    for port in (29501, 29502):
        why = f"MASTER_PORT = {port}: is in use"
        write_exits(tmp_path / str(port), {"rank": 0, "host": "a", "code": 75, "why": why})
    kinds = {diagnose(tmp_path / port, 1, HOSTS[:2], [], set()).kind for port in ("29501", "29502")}
    assert kinds == {"MASTER_PORT = #: is in use"}


def test_a_usage_error_takes_precedence_over_an_unreachable_host(tmp_path: Path) -> None:
    write_exits(tmp_path / "1", {"rank": 1, "host": "a", "code": 1, "why": "Connection closed by peer"},
         {"host": "a", "code": 2, "why": "command line = 'x': unrecognized"})
    failure = diagnose(tmp_path / "1", 1, HOSTS[:2], ["b"], set())
    assert failure.code == 2 and failure.why == "a rank: command line = 'x': unrecognized"
    write_exits(tmp_path / "2", {"rank": 1, "host": "a", "code": 1, "why": "ValueError"})
    assert diagnose(tmp_path / "2", 1, HOSTS[:2], ["b"], set()).hosts == ["b"]
    write_exits(tmp_path / "3", {"rank": 2, "host": "b", "code": 2, "why": "data.train = '/x': no such folder"})
    assert diagnose(tmp_path / "3", 1, HOSTS[:2], ["b"], set()).why == "host b does not respond"


def test_a_usage_error_that_rank_0s_host_does_not_report_is_specific_to_one_host(tmp_path: Path) -> None:
    mistake = {"code": 2, "why": "data.train = '/x': no such folder"}
    write_exits(tmp_path / "1", {"rank": 2, "host": "b", **mistake})
    write_json(tmp_path / "1" / "rank-0.json", {"rank": 0, "host": "a"})
    failure = diagnose(tmp_path / "1", 1, HOSTS[:2], [], set())
    assert (failure.code, failure.hosts) == (75, ["b"]) and "no such folder" in failure.why
    write_exits(tmp_path / "2", {"rank": 2, "host": "b", **mistake}, {"rank": 1, "host": "a", **mistake})
    write_json(tmp_path / "2" / "rank-0.json", {"rank": 0, "host": "a"})
    assert diagnose(tmp_path / "2", 1, HOSTS[:2], [], set()).code == 2
    heard = {"rank": 0, "host": "a", "code": 2, "why": "rank 2 on host b could not start: ...", "blames": [2]}
    write_exits(tmp_path / "3", heard, {"rank": 2, "host": "b", **mistake})
    write_json(tmp_path / "3" / "rank-0.json", {"rank": 0, "host": "a"})
    failure = diagnose(tmp_path / "3", 2, HOSTS[:2], [], set())
    assert (failure.code, failure.hosts) == (75, ["b"]) and "no such folder" in failure.why


def test_a_failure_caused_by_another_ranks_is_an_echo() -> None:
    assert is_echo({"code": 85, "why": ""}) and is_echo({"code": 1, "why": "x Connection closed by peer y"})
    assert not is_echo({"code": 1, "why": "ValueError"})
    assert not is_echo({"code": 1, "why": "BrokenPipeError: [Errno 32] Broken pipe"})
    assert not is_echo({"code": 85, "why": "was suspended for 20 s, then: hung", "slept_s": 20.0})


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_rank_that_nccls_watchdog_would_abort_leaves_its_stacks(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "attempt-1"
    folder.mkdir()
    program = ("import os, sys\nfrom pathlib import Path\nfrom prelora_ds.hosts.heartbeat import AttemptRecord\n"
               "AttemptRecord(Path(sys.argv[1]), 3).record_fatal_signals()\nos.kill(os.getpid(), int(sys.argv[2]))")
    ended = subprocess.run([sys.executable, "-c", program, folder, str(int(number))], check=False)
    assert ended.returncode == -number
    assert aborted_ranks(folder) == ({3} if number == signal.SIGABRT else set())
    assert ('File "<string>", line 5' in (folder / "fatal-3.txt").read_text()) == (number != signal.SIGKILL)


def test_aborted_ranks_are_echoes_of_the_one_that_left_nothing(world: World) -> None:
    """NCCL aborts the ranks that lost another one, and the launcher ends."""
    script = """
    for rank in 0 1 2 3; do
        echo "{\\"rank\\": $rank, \\"host\\": \\"$([ $rank -lt 2 ] && echo a || echo b)\\"}" > "$own/rank-$rank.json"
        : > "$own/fatal-$rank.txt"
    done
    [ "$attempt" = 2 ] && mark DONE && exit 0
    for rank in 0 1 3; do echo "Fatal Python error: Aborted" > "$own/fatal-$rank.txt"; done
    exit 134
    """
    assert world.supervisor(script).run() == 0
    assert attempts(world) == ["a, b", "a, c"]
    assert any("the rank on host b exited without a record" in line for line in world.said)


@pytest.mark.parametrize(("policy", "problem"), [
    (Policy(4, 4), "the hostfile has only 3 hosts"), (Policy(2, 3), "does not fit --min-nodes 3"),
    (Policy(1, 0), "does not fit --min-nodes 0")])
def test_a_policy_that_does_not_fit_the_hosts_is_refused(policy: Policy, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_policy(policy, HOSTS)


def test_a_rank_ends_without_heartbeat_or_at_a_newer_attempt(tmp_path: Path) -> None:
    attempt_dir = tmp_path / "attempt-2"
    attempt_dir.mkdir()
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 2, "renewed": 1, "patience_s": 0.2})
    watch = AttemptRecord(attempt_dir, 3)
    assert watch.check() is None
    time.sleep(0.3)
    code, why = watch.check() or (0, "")
    assert code == 87 and "the supervisor is gone" in why
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 2, "renewed": 2, "patience_s": 0.2})
    assert watch.check() is None
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 3, "renewed": 3})
    assert (watch.check() or (0, ""))[0] == 88
    assert json.loads((attempt_dir / "rank-3.json").read_text())["rank"] == 3


@pytest.mark.parametrize("heartbeat", [{"token": "x"}, {"attempt": "9"}, {"attempt": 2, "patience_s": []}])
def test_a_heartbeat_file_with_other_content_counts_as_unchanged(tmp_path: Path, heartbeat: dict) -> None:
    attempt_dir = tmp_path / "attempt-1"
    attempt_dir.mkdir()
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 1, "renewed": 1, "patience_s": 0.2})
    watch = AttemptRecord(attempt_dir, 3)
    assert watch.check() is None
    write_json(tmp_path / HEARTBEAT_FILE, heartbeat)
    assert watch.check() is None
    time.sleep(0.3)
    assert (watch.check() or (0, ""))[0] == 87


def test_a_folder_that_no_supervisor_created_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--supervised"):
        AttemptRecord(tmp_path / "attempt-x", 0)


def test_a_stalled_shared_disk_is_not_a_missing_heartbeat(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt_dir = tmp_path / "attempt-1"
    attempt_dir.mkdir()
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 1, "renewed": 1, "patience_s": 0.2})
    watch = AttemptRecord(attempt_dir, 0)
    assert watch.check() is None

    def stalled(path: Path) -> dict:
        time.sleep(0.5)
        return read_json(path)

    with monkeypatch.context() as disk:
        disk.setattr("prelora_ds.hosts.heartbeat.read_json", stalled)
        assert watch.check() is None
    time.sleep(0.3)
    assert (watch.check() or (0, ""))[0] == 87


def test_a_heartbeat_that_requests_a_stop_signals_the_rank_once(tmp_path: Path) -> None:
    attempt_dir = tmp_path / "attempt-1"
    signals = list[int]()
    attempt_dir.mkdir()
    former = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    try:
        watch = AttemptRecord(attempt_dir, 0)
        for renewed in range(3):
            write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 1, "renewed": renewed, "stop": True})
            assert watch.check() is None
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert signals == [signal.SIGUSR1]


def test_a_rank_records_its_exit_and_rank_0_writes_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt_dir = tmp_path / "attempt-1"
    attempt_dir.mkdir()
    AttemptRecord(attempt_dir, 1).mark_done()
    assert not (attempt_dir / "DONE").exists()
    AttemptRecord(attempt_dir, 0).mark_done()
    AttemptRecord(attempt_dir, 1).record_exit(85, "hung")
    assert (attempt_dir / "DONE").exists() and read_json(attempt_dir / "exit-1.json")["code"] == 85
    monkeypatch.setattr("prelora_ds.hosts.heartbeat.SUSPENDED_S", 0.1)
    frozen = AttemptRecord(attempt_dir, 2)
    time.sleep(0.2)
    frozen.check()  # the time of slow imports before the first check is not a suspension
    frozen.record_exit(1, "ValueError")
    assert read_json(attempt_dir / "exit-2.json")["slept_s"] == 0
    time.sleep(0.2)
    frozen.check()
    frozen.record_exit(85, "hung")
    assert read_json(attempt_dir / "exit-2.json")["why"] == "was suspended for 0 s, then: hung"
    monkeypatch.setattr("prelora_ds.hosts.heartbeat.JUST_RESUMED_S", 0.1)
    time.sleep(0.2)
    frozen.record_exit(1, "ValueError")
    assert read_json(attempt_dir / "exit-2.json")["slept_s"] == 0, "it had run for long after the suspension"
    unwatched = AttemptRecord(None, 0)
    unwatched.record_exit(1, "x")
    unwatched.mark_done()
    assert unwatched.check() is None


def test_every_line_of_the_command_begins_with_date_and_time(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    launcher = ["bash", "-c", 'touch "${@: -1}/DONE"', "launch/pretrain.py"]
    arguments = ["--recipe", "launch/recipes/vit_tiny_debug.yaml", f"run.output_dir={tmp_path}/out",
                 "data.train=t", "data.val=v", "train.global_batch_size=16"]
    done = subprocess.run([sys.executable, "-m", "prelora_ds.cli", "supervise", "--hostfile", tmp_path / "hosts",
                           "--nodes", "1", "--probe", "", "--", *launcher, *arguments],
                          text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d supervise: "
    first, second = done.stdout.splitlines()
    assert re.fullmatch(stamp + "attempt 1: 1 hosts: localhost", first)
    assert re.fullmatch(stamp + "bash -c .*", second)
