from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from support.pool import free_port

from prelora_ds.errors import ConfigError, LaunchError, RefusedError
from prelora_ds.hosts.check_in import Card, call_the_roll, check_master, declining, make_of, verdict_on
from prelora_ds.hosts.discovery import Ranks

MAKE = {"torch": "2.14.1", "config": "abc"}
ALL = [Card(rank, rank % 2, f"host{rank // 2}", MAKE) for rank in range(6)]


def never(error: LaunchError) -> None:
    pytest.fail(f"torch's store hung: {error}")


def test_a_full_roll_gives_the_host_of_each_rank_in_whatever_order_they_come() -> None:
    assert verdict_on(ALL[::-1], 6, 1.0) == {"hosts": ["host0", "host0", "host1", "host1", "host2", "host2"],
                                        "refused": None, "missing": None, "mistake": None}


def test_who_is_missing_and_who_came_are_named() -> None:
    missing = verdict_on([*ALL[:2], *ALL[3:4]], 6, 90.0)["missing"]
    text, absent = missing
    assert "ranks 2, 4-5 of 6 did not come within 90 s" in text and absent == [2, 4, 5]
    assert "host0: 0-1; host1: 3" in text


def test_a_rank_that_is_there_twice_is_named_with_both_hosts() -> None:
    key, value, problem, _ = verdict_on([*ALL[:5], replace(ALL[4], host="elsewhere")], 6, 1.0)["mistake"]
    assert (key, value) == ("RANK", 4) and "on host2 and on elsewhere" in problem


def test_two_ranks_with_one_device_are_named() -> None:
    key, value, problem, _ = verdict_on([*ALL[:5], replace(ALL[5], local_rank=0)], 6, 1.0)["mistake"]
    assert (key, value) == ("LOCAL_RANK", 0) and "ranks 4 and 5" in problem and "host2" in problem


@pytest.mark.parametrize("key", ["torch", "config", "new"])
def test_a_host_of_another_make_is_named(key: str) -> None:
    other = replace(ALL[4], make=MAKE | {key: "other"})
    odd, value, problem, _ = verdict_on([*ALL[:4], other, ALL[5]], 6, 1.0)["mistake"]
    assert (odd, value) == (key, "other") and "on host host2 (rank 4)" in problem


def test_the_make_of_a_process_names_its_code_and_config() -> None:
    make = make_of("a: 1")
    assert make == make_of("a: 1") != make_of("a: 2")
    assert make["torch"].startswith("2.") and len(make["prelora_ds code"]) == 12


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
        return call_the_roll(Ranks(rank, rank, 3, 3, "127.0.0.1", port), MAKE, environs[rank], 20.0, never)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(call, range(3))) == [[socket.gethostname()] * 3] * 3
    assert all(environ["TORCHELASTIC_USE_AGENT_STORE"] == "True" for environ in environs)


def test_a_rank_of_another_job_on_the_same_port_leaves_and_does_no_harm() -> None:
    port = free_port()

    def call(rank: int, launcher: int | None) -> list[str] | LaunchError:
        try:
            return call_the_roll(Ranks(rank, rank, 2, 2, "127.0.0.1", port), MAKE, {}, 20.0, never, launcher)
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
    assert f"MASTER_PORT = {port}: another job on this host, started by process 17" in str(refused)


def test_ranks_whose_launcher_is_not_known_meet_all_the_same() -> None:
    port = free_port()

    def call(rank: int) -> list[str]:
        launcher = None if rank else 17
        return call_the_roll(Ranks(rank, rank, 2, 2, "127.0.0.1", port), MAKE, {}, 20.0, never, launcher)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [[socket.gethostname()] * 2] * 2




def test_every_rank_that_came_hears_who_did_not() -> None:
    port = free_port()
    def call(rank: int) -> LaunchError:
        with pytest.raises(LaunchError) as caught:
            call_the_roll(Ranks(rank, rank, 3, 3, "127.0.0.1", port), MAKE, {}, 2.0, never)
        return caught.value
    with ThreadPoolExecutor(2) as pool:
        for error in pool.map(call, range(2)):
            assert "ranks 2 of 3 did not come within 2 s" in str(error) and error.blames == (2,)


def test_rank_0_that_begins_later_is_waited_for_and_says_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.check_in.READ_S", 0.3)
    port = free_port()
    def call(rank: int) -> LaunchError:
        time.sleep(0 if rank else 2.5)
        with pytest.raises(LaunchError) as caught:
            call_the_roll(Ranks(rank, rank, 3, 3, "127.0.0.1", port), MAKE, {}, 5.0, never)
        return caught.value
    with ThreadPoolExecutor(2) as pool:
        assert [error.blames for error in pool.map(call, range(2))] == [(2,), (2,)]


MISTAKE = ConfigError("data.train", "/data", "there is no such folder", "mount it")


@pytest.mark.parametrize("refused", [0, 2])
def test_the_others_hear_in_seconds_that_a_rank_was_refused(refused: int) -> None:
    port = free_port()

    def call(rank: int) -> BaseException:
        ranks = Ranks(rank, rank, 3, 3, "127.0.0.1", port)
        with pytest.raises((ConfigError, RefusedError)) as caught:
            if rank == refused:
                with declining(ranks, {}):
                    raise MISTAKE
            time.sleep(1.0)  # the others come later
            call_the_roll(ranks, MAKE, {}, 60.0, never)
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
        with pytest.raises(ZeroDivisionError), declining(Ranks(rank, rank, 3, 3, "127.0.0.1", port), {}):
            _ = 1 / 0

    begun = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))
    assert time.monotonic() - begun < 5


def test_a_rank_that_is_refused_waits_for_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.check_in.DECLINE_S", 0.5)
    begun = time.monotonic()
    for rank, master in ((0, "127.0.0.1"), (1, "127.0.0.1"), (1, None)):
        with pytest.raises(ConfigError), declining(Ranks(rank, rank, 2, 2, master, free_port()), {}):
            raise MISTAKE
    assert time.monotonic() - begun < 5


def test_a_rank_that_nobody_listens_to_blames_rank_0() -> None:
    with pytest.raises(LaunchError, match=r"\(rank 1\) did not get through to rank 0 in 1 s") as caught:
        call_the_roll(Ranks(1, 1, 2, 2, "127.0.0.1", free_port()), MAKE, {}, 1.0, never)
    assert caught.value.blames == (0,)


def test_two_configs_in_one_job_are_a_mistake_for_all() -> None:
    port = free_port()
    def call(rank: int) -> str:
        with pytest.raises(ConfigError) as caught:
            call_the_roll(Ranks(rank, rank, 2, 2, "127.0.0.1", port), MAKE | {"config": str(rank)}, {}, 20.0, never)
        return str(caught.value)
    with ThreadPoolExecutor(2) as pool:
        assert all("(rank 1)" in text for text in pool.map(call, range(2)))


def test_a_port_where_something_else_listens_holds_no_rank_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prelora_ds.hosts.check_in.READ_S", 0.3)
    given_up: list[LaunchError] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        ranks = Ranks(1, 1, 2, 2, "127.0.0.1", other.getsockname()[1])

        def end(error: LaunchError) -> None:
            given_up.append(error)
            other.accept()[0].close()  # in place of the end of the process

        with pytest.raises(LaunchError):
            call_the_roll(ranks, MAKE, {}, 1.0, end)
    error, = given_up
    assert "did not get through to rank 0" in str(error) and error.blames == (0,)
