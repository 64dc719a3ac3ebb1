"""Ranks check in with rank 0, in threads over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from support.pool import free_port

from prelora_ds.errors import ConfigError, LaunchError, RefusedError
from prelora_ds.hosts.check_in import (
    CheckIn,
    RankInfo,
    announcing_failure,
    check_master,
    examines_host,
    verdict_on,
)
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.hosts.installed import environment_fingerprint, installed_code

FINGERPRINT = {"torch": "2.14.1", "config": "abc"}
ALL = [RankInfo(rank, rank % 2, f"host{rank // 2}", FINGERPRINT) for rank in range(6)]


def never(error: LaunchError) -> None:
    pytest.fail(f"torch's store hung: {error}")


def check_in(ranks: Ranks, fingerprint: Mapping[str, str], environ: dict[str, str], timeout_s: float,
             give_up: Callable[[LaunchError], None], launcher: int | None = None) -> list[str]:
    return CheckIn(ranks, environ, timeout_s, give_up, launcher).meet(fingerprint)


def test_when_all_ranks_check_in_the_host_of_each_is_returned_whatever_their_order() -> None:
    assert verdict_on(ALL[::-1], 6, 1.0) == {"hosts": ["host0", "host0", "host1", "host1", "host2", "host2"],
                                        "refused": None, "missing": None, "mistake": None}


def test_missing_and_present_ranks_are_named() -> None:
    missing = verdict_on([*ALL[:2], *ALL[3:4]], 6, 90.0)["missing"]
    text, absent = missing
    assert "ranks 2, 4-5 of 6 did not check in within 90 s" in text and absent == [2, 4, 5]
    assert "host0: 0-1; host1: 3" in text


def test_a_rank_that_was_started_twice_is_named_with_both_hosts() -> None:
    key, value, problem, _ = verdict_on([*ALL[:5], replace(ALL[4], host="elsewhere")], 6, 1.0)["mistake"]
    assert (key, value) == ("RANK", 4) and "on host2 and elsewhere" in problem


def test_two_ranks_with_one_device_are_named() -> None:
    key, value, problem, _ = verdict_on([*ALL[:5], replace(ALL[5], local_rank=0)], 6, 1.0)["mistake"]
    assert (key, value) == ("LOCAL_RANK", 0) and "ranks 4 and 5" in problem and "host2" in problem


def test_two_ranks_with_one_gpu_are_named() -> None:
    """Hosts have equal addresses, and local ranks do not show which GPU a launcher gave a rank."""
    with_gpus = [replace(info, gpu=f"0000:{info.local_rank:02x}:00") for info in ALL]
    assert verdict_on(with_gpus, 6, 1.0)["mistake"] is None
    key, value, problem, _ = verdict_on([*with_gpus[:5], replace(with_gpus[5], gpu="0000:00:00")], 6, 1.0)["mistake"]
    assert (key, value) == ("GPU", "0000:00:00") and "ranks 4 and 5 on host host2" in problem


@pytest.mark.parametrize("key", ["torch", "config", "accelerator", "new"])
def test_a_host_with_another_installation_is_named(key: str) -> None:
    other = replace(ALL[4], fingerprint=FINGERPRINT | {key: "other"})
    differing, value, problem, _ = verdict_on([*ALL[:4], other, ALL[5]], 6, 1.0)["mistake"]
    assert (differing, value) == (key, "other") and "on host host2 (rank 4)" in problem


def test_the_fingerprint_of_a_process_contains_its_code_and_config() -> None:
    installed = installed_code()
    fingerprint = environment_fingerprint("a: 1", installed)
    assert fingerprint == environment_fingerprint("a: 1", installed) != environment_fingerprint("a: 2", installed)
    assert fingerprint["torch"].startswith("2.") and len(fingerprint["prelora_ds code"]) == 12


def test_a_taken_port_and_a_master_elsewhere_are_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"MASTER_PORT = {port}: is in use on host {socket.gethostname()}"):
            check_master(Ranks(0, 0, 2, master_addr="127.0.0.1", master_port=port))
    with pytest.raises(LaunchError, match="does not belong to host"):
        check_master(Ranks(0, 0, 2, master_addr="192.0.2.1"))


def test_ranks_meet_in_one_store() -> None:
    port = free_port()
    environs: list[dict[str, str]] = [{}, {}, {}]
    def call(rank: int) -> list[str]:
        return check_in(Ranks(rank, rank, 3, 3, "127.0.0.1", port), FINGERPRINT, environs[rank], 20.0, never)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(call, range(3))) == [[socket.gethostname()] * 3] * 3
    assert all(environ["TORCHELASTIC_USE_AGENT_STORE"] == "True" for environ in environs)


def test_a_rank_of_another_job_on_the_same_port_leaves_without_harm() -> None:
    port = free_port()

    def call(rank: int, launcher: int | None) -> list[str] | LaunchError:
        try:
            return check_in(Ranks(rank, rank, 2, 2, "127.0.0.1", port), FINGERPRINT, {}, 20.0, never, launcher)
        except LaunchError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        stranger = pool.submit(call, 1, 4242)
        time.sleep(0.5)
        mine = pool.submit(call, 0, 17)
        refused = stranger.result()
        theirs = pool.submit(call, 1, 17)
        here = [socket.gethostname()] * 2
        assert mine.result() == theirs.result() == here
    assert isinstance(refused, LaunchError) and refused.exit_code == 75
    assert f"MASTER_PORT = {port}: is used by another job on this host, started by process 17" in str(refused)


def test_ranks_whose_launcher_is_unknown_still_check_in() -> None:
    port = free_port()

    def call(rank: int) -> list[str]:
        launcher = None if rank else 17
        return check_in(Ranks(rank, rank, 2, 2, "127.0.0.1", port), FINGERPRINT, {}, 20.0, never, launcher)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [[socket.gethostname()] * 2] * 2


def test_every_present_rank_learns_which_ranks_are_missing() -> None:
    port = free_port()
    def call(rank: int) -> LaunchError:
        with pytest.raises(LaunchError) as caught:
            check_in(Ranks(rank, rank, 3, 3, "127.0.0.1", port), FINGERPRINT, {}, 2.0, never)
        return caught.value
    with ThreadPoolExecutor(2) as pool:
        for error in pool.map(call, range(2)):
            assert "ranks 2 of 3 did not check in within 2 s" in str(error) and error.blames == (2,)


def test_a_late_rank_0_is_waited_for_and_names_the_missing_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.check_in.READ_S", 0.3)
    port = free_port()
    def call(rank: int) -> LaunchError:
        time.sleep(0 if rank else 2.5)
        with pytest.raises(LaunchError) as caught:
            check_in(Ranks(rank, rank, 3, 3, "127.0.0.1", port), FINGERPRINT, {}, 5.0, never)
        return caught.value
    with ThreadPoolExecutor(2) as pool:
        assert [error.blames for error in pool.map(call, range(2))] == [(2,), (2,)]


MISTAKE = ConfigError("data.train", "/data", "there is no such folder", "mount it")


@pytest.mark.parametrize("refused", [0, 2])
def test_the_others_learn_within_seconds_that_a_rank_was_refused(refused: int) -> None:
    port = free_port()

    def call(rank: int) -> BaseException:
        ranks = Ranks(rank, rank, 3, 3, "127.0.0.1", port)
        with pytest.raises((ConfigError, RefusedError)) as caught:
            if rank == refused:
                with announcing_failure(ranks, {}):
                    raise MISTAKE
            time.sleep(1.0)  # the others come later
            check_in(ranks, FINGERPRINT, {}, 60.0, never)
        return caught.value

    begun = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(call, range(3)))
    assert time.monotonic() - begun < 15
    assert errors.pop(refused) is MISTAKE
    for error in errors:
        assert isinstance(error, RefusedError) and (error.exit_code, error.blames) == (2, (refused,))
        assert f"rank {refused} on host" in str(error) and "there is no such folder" in str(error)


def test_ranks_that_are_all_refused_do_not_wait_for_each_other() -> None:
    port = free_port()

    def call(rank: int) -> None:
        with pytest.raises(ZeroDivisionError), announcing_failure(Ranks(rank, rank, 3, 3, "127.0.0.1", port), {}):
            _ = 1 / 0

    begun = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))
    assert time.monotonic() - begun < 5


def test_a_refused_rank_does_not_wait_long_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.check_in.DECLINE_S", 0.5)
    begun = time.monotonic()
    for rank, master in ((0, "127.0.0.1"), (1, "127.0.0.1"), (1, None)):
        with pytest.raises(ConfigError), announcing_failure(Ranks(rank, rank, 2, 2, master, free_port()), {}):
            raise MISTAKE
    assert time.monotonic() - begun < 5


def test_a_rank_that_cannot_reach_rank_0_blames_it() -> None:
    with pytest.raises(LaunchError, match=r"\(rank 1\) could not reach rank 0 within 1 s") as caught:
        check_in(Ranks(1, 1, 2, 2, "127.0.0.1", free_port()), FINGERPRINT, {}, 1.0, never)
    assert caught.value.blames == (0,)


def test_two_configs_in_one_job_are_a_usage_error_on_every_rank() -> None:
    port = free_port()
    def call(rank: int) -> str:
        with pytest.raises(ConfigError) as caught:
            check_in(Ranks(rank, rank, 2, 2, "127.0.0.1", port), FINGERPRINT | {"config": str(rank)}, {}, 20.0, never)
        return str(caught.value)
    with ThreadPoolExecutor(2) as pool:
        assert all("(rank 1)" in text for text in pool.map(call, range(2)))


def test_a_port_of_another_program_does_not_block_a_rank_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.check_in.READ_S", 0.3)
    given_up: list[LaunchError] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        ranks = Ranks(1, 1, 2, 2, "127.0.0.1", other.getsockname()[1])

        def end(error: LaunchError) -> None:
            given_up.append(error)
            other.accept()[0].close()  # in place of the end of the process

        with pytest.raises(LaunchError):
            check_in(ranks, FINGERPRINT, {}, 1.0, end)
    error, = given_up
    assert "could not reach rank 0" in str(error) and error.blames == (0,)


# ---- what one rank of a host reads for all of them

def test_the_first_rank_of_a_host_reads_for_the_others_and_rank_0_always_reads() -> None:
    """Open MPI 5 may give rank 0 another local rank than 0."""
    readers = [(rank, local) for rank, local in [(0, 0), (1, 1), (2, 0), (3, 1), (0, 3)]
               if examines_host(Ranks(rank, local, 8))]
    assert readers == [(0, 0), (2, 0), (0, 3)]


def test_ranks_get_what_the_first_rank_of_their_own_host_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    own = threading.local()
    monkeypatch.setattr("prelora_ds.hosts.check_in.socket.gethostname", lambda: own.host)

    def call(rank: int) -> tuple[object, list[str]]:
        own.host = f"host{rank // 2}"
        meeting = CheckIn(Ranks(rank, rank % 2, 4, 2, "127.0.0.1", port), {}, 20.0, never)
        facts = [rank]
        if rank % 2:
            facts = meeting.facts_of_host()
        else:
            time.sleep(0.3)
            meeting.publish(facts)
        return facts, meeting.meet(FINGERPRINT)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(4)))
    assert [facts for facts, _ in found] == [[0], [0], [2], [2]]
    assert all(hosts == ["host0", "host0", "host1", "host1"] for _, hosts in found)


@pytest.mark.parametrize("refused", [0, 2])
def test_ranks_that_wait_for_the_first_rank_of_their_host_learn_that_one_was_refused(
        refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 is the first one of host1; rank 3 waits for it, and rank 1 for rank 0."""
    port = free_port()
    own = threading.local()
    monkeypatch.setattr("prelora_ds.hosts.check_in.socket.gethostname", lambda: own.host)

    def call(rank: int) -> BaseException:
        own.host = f"host{rank // 2}"
        ranks = Ranks(rank, rank % 2, 4, 2, "127.0.0.1", port)
        with pytest.raises((ConfigError, RefusedError)) as caught:
            if rank == refused:
                with announcing_failure(ranks, {}):
                    raise MISTAKE
            meeting = CheckIn(ranks, {}, 60.0, never)
            if rank % 2:
                meeting.facts_of_host()
            else:
                meeting.publish(rank)
            meeting.meet(FINGERPRINT)
        return caught.value

    begun = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(call, range(4)))
    assert time.monotonic() - begun < 15
    assert errors.pop(refused) is MISTAKE
    assert {str(error) for error in errors} == {f"rank {refused} on host host{refused // 2} could not start: {MISTAKE}"}


def test_a_rank_whose_host_has_no_first_rank_does_not_wait_forever() -> None:
    port = free_port()

    def call(rank: int) -> LaunchError:
        with pytest.raises(LaunchError) as caught:
            meeting = CheckIn(Ranks(rank, rank, 2, 2, "127.0.0.1", port), {}, 1.5, never)
            meeting.meet(FINGERPRINT) if rank == 0 else meeting.facts_of_host()
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(call, range(2)))
    assert "ranks 1 of 2 did not check in" in str(errors[0])
    assert str(errors[1]) == str(errors[0]) or "let the launcher count LOCAL_RANK from 0" in str(errors[1])
