"""Run SGLang on a machine without a GPU.

The pinned SGLang wheels are built for CUDA. They serve on a CPU too, but only from a process that was
*started* with the right environment: the dynamic linker and OpenMP read theirs before Python's first line. So
a launcher computes :func:`cpu_environment` and then executes the server as a new process with it.

The CPU path exists for tests and demonstrations. It covers the scheduler, memory pools, radix cache, hooks,
HTTP and metrics; it has no CUDA graphs, no FlashInfer and no NCCL.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lt_sglang.files import cache_home, ensure_folder

DRIVER_LIBRARY = "libcuda.so.1"

# sglang-kernel's extension has one undefined driver symbol. 100 is CUDA_ERROR_NO_DEVICE: the truth.
_STUB_SOURCE = """\
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    (void)data; (void)attribute; (void)pointer;
    return 100;
}
"""
_STUB_FLAGS = ("-shared", "-fPIC", "-O1", f"-Wl,-soname,{DRIVER_LIBRARY}")

# SGLang (0.5.23) starts its own NCCL communicator for every tensor-parallel group, on a CPU as well, and
# fails there with "Expected a cuda device". It carries on over gloo when the NCCL library it is told to use
# turns out not to be one. The C library always loads, and has no NCCL symbol.
_NOT_NCCL = "libc.so.6"

# Without limits SGLang takes and fills most of the machine's memory: 14 GB and 47 s for 135M parameters.
CPU_LIMITS = (
    ("--max-total-tokens", "32768"),
    ("--max-running-requests", "8"),
    ("--chunked-prefill-size", "2048"),
)
_CPU_INFO = Path("/proc/cpuinfo")


class CompilerMissing(RuntimeError):
    """No C compiler was found, or it failed."""


def gpu_memory() -> list[int]:
    """Bytes of each device that the CUDA driver sees, without importing torch; none where there is no driver.

    Asks the driver itself and not ``nvidia-smi``: it honours ``CUDA_VISIBLE_DEVICES``, and containers often
    lack the tool. The driver is asked in a child process, because CUDA must not be initialised in a process
    that forks.
    """
    probe = (
        "import ctypes, sys\n"
        f"driver = ctypes.CDLL({DRIVER_LIBRARY!r})\n"
        "count, size = ctypes.c_int(0), ctypes.c_size_t(0)\n"
        "if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):\n"
        "    sys.exit(1)\n"
        "for device in range(count.value):\n"
        "    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)\n"
        "    print(size.value)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", probe], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else [int(size) for size in done.stdout.split()]


def has_gpu() -> bool:
    """Say whether the CUDA driver sees at least one device."""
    return bool(gpu_memory())


def build_libcuda_stub(cache_dir: Path) -> Path:
    """Compile the one-symbol stand-in for the CUDA driver, once; its path. Raises CompilerMissing.

    The library lies in a folder of its own under ``cache_dir`` that holds nothing else, fit for
    ``LD_LIBRARY_PATH``, and named after what it was built from, so that it is never stale.
    """
    key = hashlib.sha256("\0".join((_STUB_SOURCE, *_STUB_FLAGS)).encode()).hexdigest()[:12]
    library = cache_dir / f"libcuda-stub-{key}" / DRIVER_LIBRARY
    if library.is_file():
        return library

    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompilerMissing(
            "SGLang needs a C compiler to start on a machine without a GPU, and no cc, gcc or clang is on "
            "the PATH. On Debian or Ubuntu: apt-get install gcc libc6-dev"
        )

    def compile_into(folder: Path) -> None:
        command = [compiler, *_STUB_FLAGS, "-x", "c", "-", "-o", str(folder / DRIVER_LIBRARY)]
        done = subprocess.run(command, input=_STUB_SOURCE, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise CompilerMissing(f"{' '.join(command)} failed:\n{done.stderr.strip()}")

    return ensure_folder(library.parent, compile_into) / DRIVER_LIBRARY


def cpu_environment(tp: int, base: Mapping[str, str]) -> dict[str, str]:
    """The changes to an environment that a CPU server needs: ``{**base, **changes}``.

    Choices the user made in ``base`` are kept where another value can work too (thread counts and core
    lists). Raises CompilerMissing if the driver stub is needed and cannot be built; ValueError for ``tp`` 0.

    tp: tensor-parallel size, one worker process each.
    base: the environment to start from, usually ``os.environ``.
    """
    if tp < 1:
        raise ValueError(f"tensor-parallel size must be at least 1, not {tp}")
    # Hiding the devices keeps torch from touching a GPU that may be there after all.
    changes = {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Several OpenMP threads a worker fight SGLang's own processes for the cores: 2 tokens/s instead of 50 to
    # 110.
    if "OMP_NUM_THREADS" not in base:
        changes["OMP_NUM_THREADS"] = "1"
    if "TORCH_COMPILE_DISABLE" not in base and not _compiles_rightly(base):
        changes["TORCH_COMPILE_DISABLE"] = "1"
    if tp > 1:
        changes["SGLANG_NCCL_SO_PATH"] = _NOT_NCCL
        # Without it SGLang wants one NUMA node for each rank.
        if not base.get("SGLANG_CPU_OMP_THREADS_BIND"):
            changes["SGLANG_CPU_OMP_THREADS_BIND"] = _core_groups(tp, sorted(os.sched_getaffinity(0)))
    if not _driver_loads():
        stub_dir = str(build_libcuda_stub(cache_home(base)).parent)
        paths = [entry for entry in base.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
        # Last, so that a driver found by anything earlier on the path wins over the stand-in.
        changes["LD_LIBRARY_PATH"] = os.pathsep.join([*(p for p in paths if p != stub_dir), stub_dir])
    return changes


def use_cpu(tp: int = 1) -> None:
    """Let this process, and those it starts, run SGLang on a CPU: for ``sglang.Engine`` in one's own program.

    Call it before torch or sglang is imported. ``tp`` and what it raises: as of cpu_environment.
    """
    changes = cpu_environment(tp, os.environ)
    os.environ.update(changes)
    if paths := changes.get("LD_LIBRARY_PATH"):
        # The linker of this process has read its path already; a library that is loaded it finds by its name.
        ctypes.CDLL(str(Path(paths.rpartition(os.pathsep)[2]) / DRIVER_LIBRARY), mode=ctypes.RTLD_GLOBAL)


def cpu_server_args() -> list[str]:
    """Return the server flags every CPU run needs, in the form of command-line arguments.

    The attention backend is left to the caller: it is what tells a stock server from ours. So are the limits,
    ``CPU_LIMITS`` or others.
    """
    # An idle scheduler otherwise polls without pause: one core for each server that waits.
    return ["--device", "cpu", "--sleep-on-idle"]


def _core_groups(tp: int, cores: list[int]) -> str:
    """Deal ``cores`` out to ``tp`` ranks, as SGLANG_CPU_OMP_THREADS_BIND wants them: ``0,1|2,3``.

    With fewer cores than ranks, ranks share.
    """
    if len(cores) < tp:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(tp))
    share, extra = divmod(len(cores), tp)
    groups, start = [], 0
    for rank in range(tp):
        end = start + share + (rank < extra)
        groups.append(",".join(map(str, cores[start:end])))
        start = end
    return "|".join(groups)


def _compiles_rightly(base: Mapping[str, str]) -> bool:
    """Whether what torch 2.14.1 compiles for this CPU can be trusted: with AVX-512 alone.

    SGLang compiles the token ids of a vocabulary that is split over ranks. For AVX2 the result is wrong (an
    IndexError in the embedding, at tp 2); with ATEN_CPU_CAPABILITY=default torch refuses to compile.
    """
    capability = base.get("ATEN_CPU_CAPABILITY")
    if capability:
        return capability == "avx512"
    try:
        return " avx512f " in _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _driver_loads() -> bool:
    """Say whether the dynamic linker finds a CUDA driver library, real or stand-in, as things are."""
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return False
    return True
