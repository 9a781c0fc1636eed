import jax
import numpy as np

from cmd_jax.performance.memory import device_memory, process_peak
from cmd_jax.performance.peak import device_peak, matmul_peak


def test_the_peak_is_measured_once_and_no_product_beats_it():
    peak = matmul_peak(seconds=0.05)
    assert matmul_peak(seconds=0.05) == peak
    assert 1e9 < peak < 1e13  # a CPU, from a phone's to a server's


def test_devices_made_of_one_cpu_share_its_peak(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert device_peak("float32") == matmul_peak("float32") / 4
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert device_peak("float32") == matmul_peak("float32")


def test_memory_of_a_process():
    before = process_peak()
    held = np.ones(2**27, np.uint8)
    found = device_memory()
    assert found["of"] == "process" and found["limit_bytes"] is None
    assert found["peak_bytes"] >= before and found["peak_bytes"] > held.nbytes


class Device:
    def __init__(self, **stats):
        self.memory_stats = lambda: stats


def test_memory_of_devices(monkeypatch):
    devices = [Device(peak_bytes_in_use=5, bytes_limit=80), Device(peak_bytes_in_use=7, bytes_limit=79)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory() == {"peak_bytes": 7, "limit_bytes": 79, "of": "devices"}
    monkeypatch.setattr(jax, "local_devices", lambda: [*devices, Device()])
    assert device_memory()["of"] == "process"
