"""Accelerators by name, with the published figures that a plan needs; nothing here is measured.

Peaks are dense bfloat16. A link's rate is from one device to all others, in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30
# XLA's GPU compiler describes a generation by: shared memory per core, shared memory per block at
# most, threads per core.
_CORES = {(8, 0): (167_936, 166_912, 2048), (9, 0): (233_472, 232_448, 2048)}
DEVICES_A_HOST = 8


@dataclass(frozen=True)
class Gpu:
    """The description of a CUDA device that XLA's compiler needs.

    Attributes:
      capability: compute capability.
      cores: number of streaming multiprocessors, with ``fpus`` float32 units each.
      l2_bytes, clock_ghz: size of the second-level cache, boost clock.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    l2_bytes: int
    clock_ghz: float


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
      name: its name on the command line.
      title: its maker's name for it.
      memory_bytes: of one device; on a TPU the compiler itself refuses what does not fit.
      flops: bfloat16 operations per second.
      bandwidth, link: bytes per second from memory, and to the other devices.
      gpu: for XLA's CUDA compiler; None for a TPU.
      tpu: generation, as libtpu names it; None for a GPU.
    """

    name: str
    title: str
    memory_bytes: int
    flops: float
    bandwidth: float
    link: float
    gpu: Gpu | None = None
    tpu: str | None = None


_HOPPER = Gpu((9, 0), cores=132, fpus=128, l2_bytes=50 << 20, clock_ghz=1.98)
DEVICES = {
    device.name: device
    for device in (
        Device(
            "a100-80gb", "NVIDIA A100-SXM4-80GB", 80 * _GIB, 312e12, 2.039e12, 300e9,
            Gpu((8, 0), cores=108, fpus=64, l2_bytes=40 << 20, clock_ghz=1.41),
        ),
        Device(
            "a100-40gb", "NVIDIA A100-SXM4-40GB", 40 * _GIB, 312e12, 1.555e12, 300e9,
            Gpu((8, 0), cores=108, fpus=64, l2_bytes=40 << 20, clock_ghz=1.41),
        ),
        Device("h100", "NVIDIA H100-SXM5-80GB", 80 * _GIB, 989e12, 3.35e12, 450e9, _HOPPER),
        Device("h200", "NVIDIA H200-SXM5-141GB", 141 * 10**9, 989e12, 4.8e12, 450e9, _HOPPER),
        Device("v5e", "TPU v5e", 16 * _GIB, 197e12, 819e9, 100e9, tpu="v5e"),
        Device("v5p", "TPU v5p", 95 * _GIB, 459e12, 2.765e12, 300e9, tpu="v5p"),
        Device("v6e", "TPU v6e", 32 * _GIB, 918e12, 1.64e12, 224e9, tpu="v6e"),
    )
}  # fmt: skip


def gpu_target(device: Device) -> str:
    """XLA's description of a GPU, as a text proto (``GpuTargetConfig``)."""
    gpu = device.gpu
    assert gpu is not None
    shared, shared_optin, threads = _CORES[gpu.capability]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared_optin,
        "threads_per_core_limit": threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(device.bandwidth),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": device.memory_bytes,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    lines = [f"  {key}: {value}" for key, value in info.items()]
    major, minor = gpu.capability
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            "runtime_version { major: 13 minor: 0 patch: 0 }",
            f'device_description_str: "{device.title}"',
        ]
    )


def topology_name(device: Device, count: int) -> str:
    """The compiler's name for this many devices together.

    Raises:
      ValueError: no such topology is known.
    """
    if device.gpu is not None:
        each = min(count, DEVICES_A_HOST)
        if count % each:
            raise ValueError(f"{count} GPUs are not a whole number of machines of {each}.")
        return f"1x{count // each}x{each}"
    flat = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
    cubes = {
        1: "1x1x1",
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
    }
    known = cubes if device.tpu == "v5p" else flat
    if count not in known:
        listed = ", ".join(map(str, known))
        raise ValueError(f"{device.title} comes in slices of {listed} chips here, not {count}.")
    return f"{device.tpu}:{known[count]}"
