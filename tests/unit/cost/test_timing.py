from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.cost.timing import GPUS, KINDS, SHARED, Rates, Work, data_sheet_rates, gpu_named

amounts = st.floats(0, 1e3)
works = st.builds(Work, **dict.fromkeys(KINDS, amounts))
rates_of = st.builds(lambda costs: Rates(dict(zip(KINDS, costs, strict=True)), "test", True),
                     st.lists(amounts, min_size=len(KINDS), max_size=len(KINDS)))


@given(works, works, rates_of)
def test_the_time_of_two_works_is_the_sum_of_their_times(a: Work, b: Work, rates: Rates) -> None:
    both = Work(**{kind: getattr(a, kind) + getattr(b, kind) for kind in KINDS})
    assert rates.step_seconds(both) == pytest.approx(rates.step_seconds(a) + rates.step_seconds(b))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_slow_a_rank_s_own_work_only(kind: str) -> None:
    rates = Rates(dict.fromkeys(KINDS, 2.0), "test", True, sharing=1.5)
    work = Work(**{kind: 10.0})
    assert rates.step_seconds(work, 1) == 20
    assert rates.step_seconds(work, 2) == (20 if kind in SHARED else 30)


@pytest.mark.parametrize(("overlaps", "overlapped_gb", "backward_share", "expected"), [
    (False, 8.0, 0.5, 30 + 20),  # a CPU
    (True, 8.0, 0.5, 30 + 20 - 15),  # no more than the backward pass can hide
    (True, 2.0, 0.5, 30 + 20 - 4),
    (True, 0.0, 0.5, 30 + 20),
])
def test_a_gpu_hides_what_it_sends_behind_the_backward_pass(overlaps: bool, overlapped_gb: float,
                                                            backward_share: float, expected: float) -> None:
    rates = Rates(dict.fromkeys(KINDS, 2.0), "test", True, overlaps=overlaps)
    work = Work(gemm_tflop=10.0, adapter_tflop=2.0, traffic_gb=3.0, wire_gb=10.0, overlapped_gb=overlapped_gb,
                backward_share=backward_share)
    assert rates.step_seconds(work) == expected


@pytest.mark.parametrize("name", GPUS)
def test_a_data_sheet_is_labelled_as_not_measured(name: str) -> None:
    rates = data_sheet_rates(name, hosts=1)
    assert not rates.measured
    assert "not measured" in rates.source and name in rates.source
    peak_s = 1 / GPUS[name].bf16_tflops
    assert rates.seconds["gemm_tflop"] > peak_s
    assert rates.seconds.keys() == set(KINDS)


def test_the_slowest_link_of_the_ring_decides() -> None:
    def seconds_per_gb(hosts: int, **bandwidths: float) -> float:
        return data_sheet_rates("H100", hosts=hosts, **bandwidths).seconds["wire_gb"]

    assert seconds_per_gb(1) == seconds_per_gb(1, inter_gb_s=1.0) < seconds_per_gb(2)
    assert seconds_per_gb(2, inter_gb_s=100.0) == pytest.approx(seconds_per_gb(2, inter_gb_s=50.0) / 2)
    assert seconds_per_gb(2, intra_gb_s=10.0, inter_gb_s=100.0) == seconds_per_gb(1, intra_gb_s=10.0)


@pytest.mark.parametrize(("device", "memory_gib", "gpu"), [
    ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"), ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80"),
    ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40-PCIe"), ("NVIDIA A100 80GB PCIe", 79.3, "A100-80-PCIe"),
    ("NVIDIA H100 PCIe", 79.6, "H100-PCIe"), ("NVIDIA H100 NVL", 93.1, "H100-NVL"),
    ("NVIDIA H100 80GB HBM3", 79.1, "H100"), ("NVIDIA H200", 139.8, "H200"), ("AMD Instinct MI250X", 64.0, "MI250X"),
    ("NVIDIA GH200 480GB", 95.0, "GH200"), ("NVIDIA GH200 120GB", 94.5, "GH200"), ("NVIDIA A10", 22.0, None),
    ("NVIDIA GeForce GTX 1080", 8.0, None), (None, 23.0, None),
])
def test_a_device_is_known_by_its_driver_s_name(device: str | None, memory_gib: float, gpu: str | None) -> None:
    assert gpu_named(device, memory_gib) == gpu
