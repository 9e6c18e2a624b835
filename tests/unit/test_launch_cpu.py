"""The CPU environment: the driver stub, the variables, and how a GPU is found."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lt_sglang.files import cache_home
from lt_sglang.launch import cpu


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, on a machine without any driver library."""
    monkeypatch.setattr(cpu, "_driver_loads", lambda: False)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f avx512vl\n")
    return tmp_path / "home"


def environment(home: Path, tp: int = 1, **base: str) -> dict[str, str]:
    return cpu.cpu_environment(tp, {"LT_SGLANG_HOME": str(home), **base})


def forbid(*_: object, **__: object) -> None:
    raise AssertionError("called")


class TestCacheHome:
    def test_follows_the_variable(self, tmp_path: Path) -> None:
        assert cache_home({"LT_SGLANG_HOME": str(tmp_path)}) == tmp_path

    @pytest.mark.parametrize("env", [{}, {"LT_SGLANG_HOME": " "}])
    def test_defaults_to_the_users_cache(self, env: dict[str, str]) -> None:
        assert cache_home(env) == Path.home() / ".cache" / "lt-sglang"


class TestStub:
    def test_answers_no_device(self, tmp_path: Path) -> None:
        library = ctypes.CDLL(str(cpu.build_libcuda_stub(tmp_path / "cache")))
        assert library.cuPointerGetAttribute(None, 0, ctypes.c_ulonglong(0)) == 100

    def test_lies_alone_in_its_folder_under_the_drivers_name(self, tmp_path: Path) -> None:
        path = cpu.build_libcuda_stub(tmp_path)
        assert [entry.name for entry in path.parent.iterdir()] == ["libcuda.so.1"]
        assert list(tmp_path.iterdir()) == [path.parent], "no scratch folder is left"

    def test_is_built_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = cpu.build_libcuda_stub(tmp_path)
        monkeypatch.setattr(cpu.subprocess, "run", forbid)
        assert cpu.build_libcuda_stub(tmp_path) == first

    def test_changed_source_is_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = cpu.build_libcuda_stub(tmp_path)
        monkeypatch.setattr(cpu, "_STUB_SOURCE", cpu._STUB_SOURCE + "int more;\n")
        assert cpu.build_libcuda_stub(tmp_path).parent != first.parent

    def test_concurrent_builds_agree(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            paths = set(pool.map(lambda _: cpu.build_libcuda_stub(tmp_path), range(4)))
        assert len(paths) == 1
        assert len(list(tmp_path.iterdir())) == 1
        ctypes.CDLL(str(paths.pop()))

    def test_names_the_missing_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu.shutil, "which", lambda _: None)
        with pytest.raises(cpu.CompilerMissing, match="apt-get install gcc"):
            cpu.build_libcuda_stub(tmp_path)

    def test_shows_what_a_broken_compiler_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\necho no headers today >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setattr(cpu.shutil, "which", lambda _: str(compiler))
        with pytest.raises(cpu.CompilerMissing, match="no headers today"):
            cpu.build_libcuda_stub(tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


class TestEnvironment:
    def test_one_rank(self, home: Path) -> None:
        stub = cpu.build_libcuda_stub(home).parent
        assert environment(home) == {
            "SGLANG_USE_CPU_ENGINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "LD_LIBRARY_PATH": str(stub),
        }

    def test_two_ranks_get_cores_and_no_nccl(self, home: Path) -> None:
        changes = environment(home, tp=2)
        assert changes["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
        library = ctypes.CDLL(changes["SGLANG_NCCL_SO_PATH"])
        assert not hasattr(library, "ncclGetVersion"), (
            "SGLang gives NCCL up for a library without its symbols"
        )

    def test_the_users_choices_stay(self, home: Path) -> None:
        changes = environment(home, tp=2, OMP_NUM_THREADS="8", SGLANG_CPU_OMP_THREADS_BIND="0-7|8-15")
        assert "OMP_NUM_THREADS" not in changes
        assert "SGLANG_CPU_OMP_THREADS_BIND" not in changes

    @pytest.mark.parametrize(
        ("flags", "base", "compiles"),
        [
            ("avx2 avx512f vl", {}, True),
            ("avx2 bmi2", {}, False),
            ("avx2 avx512f vl", {"ATEN_CPU_CAPABILITY": "avx2"}, False),
            ("avx2 avx512f vl", {"ATEN_CPU_CAPABILITY": "default"}, False),
            ("avx2 avx512f vl", {"ATEN_CPU_CAPABILITY": "avx512"}, True),
            ("avx2 bmi2", {"TORCH_COMPILE_DISABLE": "0"}, True),
        ],
    )
    def test_nothing_is_compiled_that_torch_compiles_wrongly(
        self, home: Path, flags: str, base: dict[str, str], compiles: bool
    ) -> None:
        (home.parent / "cpuinfo").write_text(f"flags : {flags}\n")
        assert ("TORCH_COMPILE_DISABLE" not in environment(home, **base)) == compiles

    def test_the_stub_comes_last_and_once(self, home: Path) -> None:
        path = environment(home, LD_LIBRARY_PATH="/opt/lib")["LD_LIBRARY_PATH"]
        assert path.split(":")[0] == "/opt/lib"
        assert environment(home, LD_LIBRARY_PATH=path)["LD_LIBRARY_PATH"] == path

    def test_a_driver_that_loads_needs_no_stub(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "_driver_loads", lambda: True)
        assert "LD_LIBRARY_PATH" not in environment(home)
        assert not home.exists()

    def test_the_base_is_left_alone(self, home: Path) -> None:
        base = {"LT_SGLANG_HOME": str(home)}
        cpu.cpu_environment(2, base)
        assert base == {"LT_SGLANG_HOME": str(home)}

    def test_refuses_no_ranks(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            cpu.cpu_environment(0, {})

    @pytest.mark.parametrize(
        ("tp", "cores", "groups"),
        [
            (2, [0, 1], "0|1"),
            (2, [0, 1, 2, 3, 4], "0,1,2|3,4"),
            (3, [4, 6, 8], "4|6|8"),
            (4, [0, 1], "0|1|0|1"),
        ],
    )
    def test_cores_are_dealt_out(self, tp: int, cores: list[int], groups: str) -> None:
        assert cpu._core_groups(tp, cores) == groups


class TestServerArgs:
    def test_leave_the_attention_backend_to_the_caller(self) -> None:
        args = cpu.cpu_server_args()
        assert args[:2] == ["--device", "cpu"]
        assert not any(arg.startswith("--attention-backend") for arg in args)

    def test_leave_json_schemas_to_sglang(self) -> None:
        assert "--grammar-backend" not in cpu.cpu_server_args()


class TestHasGpu:
    @pytest.mark.parametrize(("count", "expected"), [(0, False), (2, True)])
    def test_asks_the_driver(
        self, count: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = (
            f"int cuInit(int f) {{ return 0; }}\nint cuDeviceGetCount(int *n) {{ *n = {count}; return 0; }}\n"
            "int cuDeviceTotalMem_v2(unsigned long *size, int device) { *size = device + 7UL; return 0; }\n"
        )
        monkeypatch.setattr(cpu, "_STUB_SOURCE", source)
        driver = cpu.build_libcuda_stub(tmp_path)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(driver.parent))
        assert cpu.has_gpu() is expected
        assert cpu.gpu_memory() == [7, 8][:count]

    def test_the_stub_is_not_a_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LD_LIBRARY_PATH", str(cpu.build_libcuda_stub(tmp_path).parent))
        assert cpu.has_gpu() is False

    def test_a_driver_that_hangs_is_not_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def hang(*_: object, **__: object) -> None:
            raise subprocess.TimeoutExpired("probe", 60)

        monkeypatch.setattr(cpu.subprocess, "run", hang)
        assert cpu.has_gpu() is False


def test_importing_costs_nothing() -> None:
    code = "import sys, lt_sglang.launch.cpu; sys.exit(bool({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
