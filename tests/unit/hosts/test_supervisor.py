"""The supervisor over real processes that leave the records of ranks, and a rank's side of the lease."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prelora_ds.errors import ConfigError, LaunchError
from prelora_ds.hosts.diagnosis import diagnose, hostfile_name, is_echo
from prelora_ds.hosts.heartbeat import HEARTBEAT_FILE, LOCK_FILE, AttemptRecord, read_json, write_json
from prelora_ds.hosts.hostfile import Host
from prelora_ds.hosts.lock import Lock
from prelora_ds.hosts.supervisor import Policy, Supervisor, check_policy, substitute

HOSTS = [Host("a", 2), Host("b", 2), Host("c", 2)]
# A launcher: its words are HOSTS... --supervised FOLDER. `die CODE HOST WHY` leaves a rank's record.
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
    """A folder, hosts that answer while a file of theirs is there, and what the supervisor said."""

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


def test_a_marker_decides_whatever_the_exit_code_says(world: World) -> None:
    assert world.supervisor("mark DONE; exit 7").run() == 0
    assert world.supervisor("mark STOPPED; exit 0").run() == 99


def test_an_exit_code_of_0_without_a_marker_is_a_failure_and_the_same_twice_is_enough(world: World) -> None:
    assert world.supervisor("echo all is well; exit 0").run() == 75
    assert len(attempts(world)) == 2
    assert "the same failure twice" in world.said[-1] and "all is well" in world.said[-2]


def test_a_host_that_failed_makes_room_for_the_spare_and_the_next_attempt_may_succeed(world: World) -> None:
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


def test_a_mistake_of_the_user_is_not_tried_again(world: World) -> None:
    assert world.supervisor("die 2 a 'no such recipe'").run() == 2
    assert len(attempts(world)) == 1


def test_silent_hosts_are_left_out_and_too_few_are_named(world: World) -> None:
    (world.folder / "a").unlink()
    assert world.supervisor("mark DONE").run() == 0
    assert attempts(world) == ["b, c"] and "host a does not respond" in world.said
    (world.folder / "b").unlink()
    with pytest.raises(LaunchError, match="only 1 of 3 hosts respond, 2 needed; unreachable: a, b"):
        world.supervisor("mark DONE").run()


def test_with_fewer_hosts_it_goes_on_only_where_the_batch_divides(world: World) -> None:
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


def test_ranks_whose_launcher_was_killed_get_the_grace_to_save(world: World) -> None:
    script = """
    [ "$attempt" = 2 ] && mark DONE && exit
    ( trap 'sleep 0.3; mark STOPPED; exit 99' TERM; mark trapped; while :; do sleep 0.05; done ) &
    while [ ! -e "$own/trapped" ]; do sleep 0.05; done
    kill -KILL $$"""
    assert world.supervisor(script, grace_s=5.0).run() == 0
    assert (world.folder / "out" / "attempt-1" / "STOPPED").exists()
    assert any(line.startswith("attempt 1 failed on a, b (exit code 75)") for line in world.said)


def test_a_run_that_orphans_stopped_is_started_again(world: World) -> None:
    script = """[ "$attempt" = 2 ] && mark DONE && exit; mark STOPPED; die 87 b "the launcher is gone" """
    assert world.supervisor(script).run() == 0
    assert any("attempt 1 failed (exit code 87): the launcher is gone" in line for line in world.said)


def test_an_attempt_whose_process_ignores_all_but_sigkill_is_bounded(world: World) -> None:
    script = """( trap '' TERM; sleep 60 ) & [ "$attempt" = 2 ] && mark DONE; die 1 b x"""
    begun = time.monotonic()
    assert world.supervisor(script).run() == 0
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("change", [{"command": ["/nowhere/launcher"]}, {"policy": Policy(2, 2, probe="'")}])
def test_a_command_that_cannot_be_started_is_the_user_s_mistake(world: World, change: dict) -> None:
    with pytest.raises(ConfigError, match=r"COMMAND = '/nowhere/launcher': cannot be started|--probe = "):
        replace(world.supervisor("mark DONE"), **change).run()


def test_a_folder_that_cannot_be_written_is_worth_another_try(world: World) -> None:
    (world.folder / "out").touch()
    with pytest.raises(LaunchError, match="out cannot be written"):
        world.supervisor("mark DONE").run()


@pytest.mark.parametrize("record", [{"code": "x"}, {"code": 1, "blames": 7}, {"rank": []}])
def test_a_record_of_other_content_is_one_that_cannot_be_read(tmp_path: Path, record: dict) -> None:
    ends(tmp_path / "attempt-1", record)
    assert "a record cannot be read" in diagnose(tmp_path / "attempt-1", 1, HOSTS, [], set()).why


def test_a_folder_beside_the_attempts_is_not_counted_as_one(world: World) -> None:
    for name in ("attempt-2", "attempt-7.bak", "attempt-", "attempt-x", "old"):
        (world.folder / "out" / name).mkdir(parents=True)
    assert world.supervisor("mark DONE").run() == 0
    assert (world.folder / "out" / "attempt-3" / "DONE").exists()


def test_a_host_that_falls_silent_ends_the_attempt(world: World) -> None:
    script = f'[ "$attempt" = 2 ] && mark DONE && exit; rm {world.folder}/b; sleep 60'
    assert world.supervisor(script, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, b", "a, c"]
    assert any("attempt 1 failed on b (exit code 75): host b does not respond" in line for line in world.said)


def test_the_launcher_gets_hostfile_environment_and_the_words_filled_in(world: World) -> None:
    script = 'echo "$DS_ENV_FILE $MASTER_ADDR $MASTER_PORT $hosts"; mark DONE'
    assert world.supervisor(script, interface="eth0").run() == 0
    own = world.folder / "out" / "attempt-1"
    assert (own / "launcher.log").read_text().split() == [str(own / "ds_env"), "a", "29501", "a,b"]
    assert (own / "hostfile").read_text() == "a slots=2\nb slots=2\n"
    assert "GLOO_SOCKET_IFNAME=eth0\n" in (own / "ds_env").read_text()
    assert substitute("{a}:{b}{c}", {"a": "1", "b": "2"}) == "1:2{c}"


def test_hosts_that_come_back_while_they_are_looked_for_are_taken(world: World) -> None:
    """A scheduler that restarts answers no probe for a while."""
    for host in HOSTS:
        (world.folder / host.name).unlink()
    back = threading.Timer(0.5, lambda: [(world.folder / name).touch() for name in "ac"])
    back.start()
    assert world.supervisor("mark DONE", patience_s=20.0, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, c"] and world.said[:3] == [f"host {name} does not respond" for name in "abc"]


def test_a_round_of_probes_that_nobody_answers_ends_no_healthy_run(world: World) -> None:
    script = f'rm {world.folder}/[abc]; sleep 1; touch {world.folder}/{{a,b,c}}; sleep 0.5; mark DONE'
    assert world.supervisor(script, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, b"]


def test_the_own_host_answers_while_its_network_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.supervisor.is_mine", lambda name: name == "a")
    script = f'rm {world.folder}/[bc]; sleep 1; touch {world.folder}/{{b,c}}; sleep 0.5; mark DONE'
    assert world.supervisor(script, probe_s=0.1, nodes=3, min_nodes=3, ranks=(6,)).run() == 0
    assert attempts(world) == ["a, b, c"]


def test_a_probe_that_gets_no_process_tells_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object, **options: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    supervisor = world.supervisor("mark DONE")
    with monkeypatch.context() as system:
        system.setattr("prelora_ds.hosts.supervisor.subprocess.Popen", none_left)
        assert supervisor._unreachable(HOSTS) == []
    with pytest.raises(ConfigError, match="cannot be started"):
        world.supervisor("mark DONE", probe="/nowhere {host}").run()


def test_fewer_hosts_are_taken_only_when_the_others_do_not_come_back(world: World) -> None:
    (world.folder / "b").unlink()
    (world.folder / "c").unlink()
    threading.Timer(0.5, (world.folder / "c").touch).start()
    assert world.supervisor("mark DONE", ranks=(2, 4), min_nodes=1, patience_s=20.0, probe_s=0.1).run() == 0
    assert attempts(world) == ["a, c"]


def test_a_supervisor_that_stood_still_leaves_the_run_to_its_successor(world: World) -> None:
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


def test_a_second_supervisor_is_refused_and_the_first_one_s_attempt_stays_the_newest(world: World) -> None:
    (world.folder / "out").mkdir()
    first = Lock(world.folder / "out" / LOCK_FILE).take()
    with pytest.raises(LaunchError, match=r"is in use by process"):
        world.supervisor("mark DONE").run()
    assert not (world.folder / "out" / HEARTBEAT_FILE).exists() and not attempts(world)
    first.release()
    assert world.supervisor("mark DONE").run() == 0 and len(attempts(world)) == 1


def test_a_host_is_known_by_its_name_in_the_hostfile() -> None:
    full, short = [Host("n1.hsn.site", 4), Host("n2.hsn.site", 4)], [Host("n1", 4), Host("n2", 4)]
    assert hostfile_name("n2", 0, full) == "n2.hsn.site" and hostfile_name("n2.hsn.site", 0, short) == "n2"
    assert hostfile_name("n2", None, [*full, Host("n2.other", 4)]) == "n2", "two could be meant"
    addresses = [Host("10.0.0.1", 4), Host("10.0.0.2", 4)]
    assert hostfile_name("n2", 4, addresses) == "10.0.0.2" and hostfile_name("n2", 8, addresses) == "n2"
    assert hostfile_name("10.0.0.2", 0, addresses) == "10.0.0.2"


def ends(own: Path, *records: dict) -> None:
    """Records as ranks leave them, oldest first."""
    own.mkdir()
    for number, record in enumerate(records):
        path = own / f"exit-{record.get('rank', 'x')}.json"
        write_json(path, record)
        os.utime(path, (number, number))


WAITED = {"code": 75, "why": "ranks 2-3 of 4 did not check in within 9 s; present: ...", "blames": [2, 3]}
UNHEARD = {"code": 75, "why": "host b (rank 2) could not reach rank 0 within 9 s", "blames": [0]}


def test_a_rank_that_waited_in_vain_names_the_host_of_those_that_did_not_come(tmp_path: Path) -> None:
    ends(tmp_path / "1", {"rank": 1, "host": "a", **WAITED}, {"rank": 0, "host": "a", **WAITED})
    failure = diagnose(tmp_path / "1", 1, HOSTS[:2], [], {"a", "b"})
    assert failure.hosts == ["b"] and failure.code == 75 and failure.why.startswith("rank 0: ranks 2-3")
    ends(tmp_path / "2", {"rank": 2, "host": "b", **UNHEARD})
    assert diagnose(tmp_path / "2", 1, HOSTS[:2], [], {"a", "b"}).hosts == ["a"], "whoever waits for rank 0"
    ends(tmp_path / "3", {"rank": 2, "host": "b", **UNHEARD}, {"rank": 0, "host": "a", **WAITED})
    assert diagnose(tmp_path / "3", 1, HOSTS[:2], [], {"a", "b"}).hosts == ["b"], "rank 0 knows who came"
    ends(tmp_path / "4", {"rank": 0, "host": "a", **WAITED}, {"rank": 2, "host": "b", "code": 1, "why": "no numpy"})
    assert diagnose(tmp_path / "4", 1, HOSTS[:2], [], set()).why == "rank 2: no numpy"
    ends(tmp_path / "5", {"rank": 0, "host": "a", **WAITED, "blames": [4, 5, 6]})
    assert diagnose(tmp_path / "5", 1, HOSTS[:2], [], {"a"}).hosts == [], "more ranks than the hostfile has slots"


def test_two_failures_that_differ_in_a_port_are_the_same(tmp_path: Path) -> None:
    for port in (29501, 29502):
        ends(tmp_path / str(port), {"rank": 0, "host": "a", "code": 75, "why": f"MASTER_PORT = {port}: is in use"})
    kinds = {diagnose(tmp_path / port, 1, HOSTS[:2], [], set()).kind for port in ("29501", "29502")}
    assert kinds == {"MASTER_PORT = #: is in use"}


def test_a_mistake_of_the_user_goes_before_a_host_that_does_not_answer(tmp_path: Path) -> None:
    ends(tmp_path / "1", {"rank": 1, "host": "a", "code": 1, "why": "Connection closed by peer"},
         {"host": "a", "code": 2, "why": "command line = 'x': unrecognized"})
    failure = diagnose(tmp_path / "1", 1, HOSTS[:2], ["b"], set())
    assert failure.code == 2 and failure.why == "a rank: command line = 'x': unrecognized"
    ends(tmp_path / "2", {"rank": 1, "host": "a", "code": 1, "why": "ValueError"})
    assert diagnose(tmp_path / "2", 1, HOSTS[:2], ["b"], set()).hosts == ["b"]
    ends(tmp_path / "3", {"rank": 2, "host": "b", "code": 2, "why": "data.train = '/x': no such folder"})
    assert diagnose(tmp_path / "3", 1, HOSTS[:2], ["b"], set()).why == "host b does not respond"


def test_a_mistake_that_only_another_host_than_rank_0s_tells_is_that_hosts(tmp_path: Path) -> None:
    mistake = {"code": 2, "why": "data.train = '/x': no such folder"}
    ends(tmp_path / "1", {"rank": 2, "host": "b", **mistake})
    write_json(tmp_path / "1" / "rank-0.json", {"rank": 0, "host": "a"})
    failure = diagnose(tmp_path / "1", 1, HOSTS[:2], [], set())
    assert (failure.code, failure.hosts) == (75, ["b"]) and "no such folder" in failure.why
    ends(tmp_path / "2", {"rank": 2, "host": "b", **mistake}, {"rank": 1, "host": "a", **mistake})
    write_json(tmp_path / "2" / "rank-0.json", {"rank": 0, "host": "a"})
    assert diagnose(tmp_path / "2", 1, HOSTS[:2], [], set()).code == 2
    heard = {"rank": 0, "host": "a", "code": 2, "why": "rank 2 on host b could not start: ...", "blames": [2]}
    ends(tmp_path / "3", heard, {"rank": 2, "host": "b", **mistake})
    write_json(tmp_path / "3" / "rank-0.json", {"rank": 0, "host": "a"})
    failure = diagnose(tmp_path / "3", 2, HOSTS[:2], [], set())
    assert (failure.code, failure.hosts) == (75, ["b"]) and "no such folder" in failure.why


def test_a_rank_that_only_felt_anothers_end_is_an_echo() -> None:
    assert is_echo({"code": 85, "why": ""}) and is_echo({"code": 1, "why": "x Connection closed by peer y"})
    assert not is_echo({"code": 1, "why": "ValueError"})
    assert not is_echo({"code": 1, "why": "BrokenPipeError: [Errno 32] Broken pipe"})
    assert not is_echo({"code": 85, "why": "was suspended for 20 s, then: hung", "slept_s": 20.0})


@pytest.mark.parametrize("policy", [Policy(4, 4), Policy(2, 3), Policy(1, 0)])
def test_a_policy_that_does_not_fit_the_hosts_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError):
        check_policy(policy, HOSTS)


def test_a_rank_ends_when_the_lease_stops_or_names_a_newer_attempt(tmp_path: Path) -> None:
    own = tmp_path / "attempt-2"
    own.mkdir()
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 2, "renewed": 1, "patience_s": 0.2})
    watch = AttemptRecord(own, 3)
    assert watch.check() is None
    time.sleep(0.3)
    code, why = watch.check() or (0, "")
    assert code == 87 and "the supervisor is gone" in why
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 2, "renewed": 2, "patience_s": 0.2})
    assert watch.check() is None
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 3, "renewed": 3})
    assert (watch.check() or (0, ""))[0] == 88
    assert json.loads((own / "rank-3.json").read_text())["rank"] == 3


@pytest.mark.parametrize("lease", [{"token": "x"}, {"attempt": "9"}, {"attempt": 2, "patience_s": []}])
def test_a_lease_of_other_content_has_not_changed(tmp_path: Path, lease: dict) -> None:
    own = tmp_path / "attempt-1"
    own.mkdir()
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 1, "renewed": 1, "patience_s": 0.2})
    watch = AttemptRecord(own, 3)
    assert watch.check() is None
    write_json(tmp_path / HEARTBEAT_FILE, lease)
    assert watch.check() is None
    time.sleep(0.3)
    assert (watch.check() or (0, ""))[0] == 87


def test_a_folder_that_no_supervisor_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--supervised"):
        AttemptRecord(tmp_path / "attempt-x", 0)


def test_a_shared_disk_that_stalls_is_no_silence_of_the_supervisor(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "attempt-1"
    own.mkdir()
    write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 1, "renewed": 1, "patience_s": 0.2})
    watch = AttemptRecord(own, 0)
    assert watch.check() is None

    def stalled(path: Path) -> dict:
        time.sleep(0.5)
        return read_json(path)

    with monkeypatch.context() as disk:
        disk.setattr("prelora_ds.hosts.heartbeat.read_json", stalled)
        assert watch.check() is None
    time.sleep(0.3)
    assert (watch.check() or (0, ""))[0] == 87


def test_a_lease_that_asks_to_stop_signals_the_rank_once(tmp_path: Path) -> None:
    own, signals = tmp_path / "attempt-1", list[int]()
    own.mkdir()
    former = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    try:
        watch = AttemptRecord(own, 0)
        for renewed in range(3):
            write_json(tmp_path / HEARTBEAT_FILE, {"attempt": 1, "renewed": renewed, "stop": True})
            assert watch.check() is None
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert signals == [signal.SIGUSR1]


def test_a_rank_leaves_its_end_and_rank_0_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "attempt-1"
    own.mkdir()
    AttemptRecord(own, 1).mark_done()
    assert not (own / "DONE").exists()
    AttemptRecord(own, 0).mark_done()
    AttemptRecord(own, 1).record_exit(85, "hung")
    assert (own / "DONE").exists() and read_json(own / "exit-1.json")["code"] == 85
    monkeypatch.setattr("prelora_ds.hosts.heartbeat.SUSPENDED_S", 0.1)
    frozen = AttemptRecord(own, 2)
    time.sleep(0.2)
    frozen.check()  # it imported for long: not frozen yet
    frozen.record_exit(1, "ValueError")
    assert read_json(own / "exit-2.json")["slept_s"] == 0
    time.sleep(0.2)
    frozen.check()
    frozen.record_exit(85, "hung")
    assert read_json(own / "exit-2.json")["why"] == "was suspended for 0 s, then: hung"
    monkeypatch.setattr("prelora_ds.hosts.heartbeat.JUST_RESUMED_S", 0.1)
    time.sleep(0.2)
    frozen.record_exit(1, "ValueError")
    assert read_json(own / "exit-2.json")["slept_s"] == 0, "it went on for long"
    unwatched = AttemptRecord(None, 0)
    unwatched.record_exit(1, "x")
    unwatched.mark_done()
    assert unwatched.check() is None
