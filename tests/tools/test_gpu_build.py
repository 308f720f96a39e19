"""Before a build for a GPU: what fits what, by tables of real versions, and with programs that only say theirs."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tools import bootstrap, gpu_build
from tools.gpu_build import SetupError

NVCC_SAYS = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2023 NVIDIA Corporation
Cuda compilation tools, release {0}, V{0}.140
"""


def program(folder: Path, name: str, says: str, code: int = 0) -> None:
    """An executable that prints a text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("cuda", "gcc_limit", "card", "driver", "gcc", "words"),
    [
        # Ubuntu 22.04's toolkit (11.5), Debian 12's (11.8), Ubuntu 24.04's (12.0)
        ((11, 5), 11, (8, 6), (535, 183, 1), 11, []),
        ((11, 5), 11, (8, 9), (550, 54, 14), 11, ["8.9, CUDA 11.8 or newer"]),
        ((11, 8), 11, (8, 9), (550, 54, 14), 12, ["GCC up to 11, here is 12", "CUDAHOSTCXX=g++-11"]),
        ((11, 8), 11, (12, 0), (570, 86, 10), 11, ["12.0, CUDA 12.8 or newer"]),
        ((12, 0), 12, (12, 0), (575, 57, 8), 13, ["12.0, CUDA 12.8 or newer", "GCC up to 12"]),
        ((12, 0), 12, (9, 0), (525, 60, 13), 12, []),
        ((12, 8), 14, (12, 0), (570, 86, 10), 13, []),
        ((12, 8), 14, (12, 1), (580, 95, 5), 13, ["12.1, CUDA 12.9 or newer"]),
        # CUDA 13: driver 580, and no card before Turing
        ((13, 0), 15, (8, 9), (575, 57, 8), 13, ["driver 580 or newer, here is 575.57.8"]),
        ((13, 0), 15, (8, 9), (580, 65, 6), 13, []),
        ((13, 5), 16, (7, 5), (580, 65, 6), 14, []),
        ((13, 5), 16, (7, 0), (580, 65, 6), 14, ["dropped compute capability 7.0: install CUDA 12.x"]),
        ((13, 5), 16, (6, 1), (), None, ["dropped compute capability 6.1"]),
        ((12, 9), 14, (3, 5), (470, 256, 2), 9, ["install CUDA 11.x", "driver 525.60 or newer"]),
        ((14, 0), None, (12, 0), (580, 65, 6), 15, []),
        ((13, 5), 16, (13, 0), (610, 1, 1), 15, []),  # a card that nobody knows yet, the newest toolkit
        ((12, 6), 13, (13, 0), (610, 1, 1), 13, ["13.0, CUDA 13.0 or newer"]),
        ((13, 0), 15, (8, 9), (), 13, []),  # no driver here: built for another machine
    ],
)
def test_what_does_not_fit_is_said_with_its_fix(
    cuda: tuple[int, ...],
    gcc_limit: int | None,
    card: tuple[int, ...],
    driver: tuple[int, ...],
    gcc: int | None,
    words: list[str],
) -> None:
    said = gpu_build.misfits(cuda, gcc_limit, [card], driver, gcc)
    assert bool(said) == bool(words), said
    for word in words:
        assert any(word in line for line in said), said


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("8.9, 580.65.06, NVIDIA GeForce RTX 4090", [((8, 9), (580, 65, 6))]),
        (
            "12.0, 570.133.07, NVIDIA GeForce RTX 5090\n8.6, 570.133.07, NVIDIA GeForce RTX 3090, 24 GB",
            [((12, 0), (570, 133, 7)), ((8, 6), (570, 133, 7))],
        ),
        ("[N/A], 470.256.02, Tesla K80\n", []),
        ("", []),
    ],
)
def test_cards_are_read_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cards: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    program(tmp_path, "nvidia-smi", text)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert [(card.capability, card.driver) for card in gpu_build.nvidia_cards()] == cards


def test_a_driver_that_does_not_know_the_question_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: Tesla V100" || exit 2\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SetupError, match="older than 510") as caught:
        gpu_build.nvidia_cards()
    assert "GPU_ARCH" in caught.value.args[1]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("89", "89-real"),
        ("8.9", "89-real"),
        ("sm_120a", "120-real"),
        ("86;120", "86-real;120-real"),
        ("120, 90-real", "90-real;120-real"),
    ],
)
def test_named_architectures_become_machine_code_only(named: str, expected: str) -> None:
    assert gpu_build.architectures(gpu_build.capabilities(named)) == expected


@pytest.mark.parametrize("named", ["ada", "native", "8", "89;x"])
def test_what_is_no_compute_capability_is_refused(named: str) -> None:
    with pytest.raises(SetupError, match=re.escape(named)):
        gpu_build.capabilities(named)


def test_headers_say_which_compiler_a_toolkit_takes(tmp_path: Path) -> None:
    program(tmp_path, "bin/nvcc", NVCC_SAYS.format("12.0"))
    assert gpu_build.toolkit_at(tmp_path) == gpu_build.Toolkit(tmp_path, (12, 0), None)
    header = tmp_path / "include/crt/host_config.h"
    header.parent.mkdir(parents=True)
    header.write_text("#if __GNUC__ > 12\n#error -- unsupported GNU version!\n")
    assert gpu_build.toolkit_at(tmp_path) == gpu_build.Toolkit(tmp_path, (12, 0), 12)
    assert gpu_build.toolkit_at(tmp_path / "include") is None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `bin` in PATH and one toolkit, CUDA 12.0, in CUDA_PATH; the choice of GPU is written beside it."""
    monkeypatch.setattr(bootstrap, "GPU_CHOICE", tmp_path / "choice")
    monkeypatch.setattr(bootstrap, "make_venv", lambda: None)
    monkeypatch.setattr(bootstrap, "check_space", lambda needed=0: None)
    monkeypatch.setattr(gpu_build, "has_packaged_cuda", lambda: True)
    for variable in ("CMAKE_ARGS", "GPU_ARCH", "CUDAHOSTCXX", "NVCC_CCBIN", "CUDA_HOME", "CUDAToolkit_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    cuda = bootstrap.GPU_BACKENDS["cuda"]
    monkeypatch.setitem(bootstrap.GPU_BACKENDS, "cuda", cuda._replace(prefixes=()))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    program(tmp_path, "toolkit/bin/nvcc", NVCC_SAYS.format("12.0"))
    (tmp_path / "toolkit/include").mkdir()
    (tmp_path / "toolkit/include/cublas_v2.h").touch()
    program(tmp_path, "bin/g++", "12.2.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return tmp_path


def test_the_machines_toolkit_is_used_where_it_fits(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(machine, "bin/nvidia-smi", "8.9, 550.54.14, NVIDIA GeForce RTX 4090")
    bootstrap.choose_gpu("cuda")
    assert f"-DCMAKE_CUDA_COMPILER={machine}/toolkit/bin/nvcc" in bootstrap.cmake_args()
    assert "-DCMAKE_CUDA_ARCHITECTURES=89-real" in bootstrap.cmake_args()
    said = capsys.readouterr().out
    assert "RTX 4090: compute capability 8.9, driver 550.54.14" in said
    assert "CUDA 12.0" in said


def test_a_toolkit_that_is_too_old_gives_way_to_pypis(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(machine, "bin/nvidia-smi", "12.0, 580.95.05, NVIDIA GeForce RTX 5090")
    bootstrap.choose_gpu("cuda")
    assert f"-DCMAKE_CUDA_COMPILER={bootstrap.CUDA_ROOT}/bin/nvcc" in bootstrap.cmake_args()
    assert "-DCMAKE_CUDA_ARCHITECTURES=120-real" in bootstrap.cmake_args()
    assert "not used" in capsys.readouterr().out


def test_nothing_is_chosen_where_no_toolkit_fits(machine: Path) -> None:
    program(machine, "bin/nvidia-smi", "12.0, 570.86.10, NVIDIA GeForce RTX 5080")
    with pytest.raises(SetupError) as caught:
        bootstrap.choose_gpu("cuda")
    message, hint = caught.value.args
    assert "CUDA 12.8 or newer" in message
    assert "driver 580 or newer, here is 570.86.10" in message
    assert "make vulkan" in hint
    assert not bootstrap.GPU_CHOICE.exists()


def test_named_cards_need_no_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError) as caught:
        bootstrap.choose_gpu("cuda")
    assert "GPU_ARCH" in caught.value.args[1]
    monkeypatch.setenv("GPU_ARCH", "86;89")
    bootstrap.choose_gpu("cuda")
    assert "-DCMAKE_CUDA_ARCHITECTURES=86-real;89-real" in bootstrap.cmake_args()
    monkeypatch.delenv("GPU_ARCH")
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CUDA_ARCHITECTURES=90")
    bootstrap.choose_gpu("cuda")
    assert bootstrap.cmake_args().count("ARCHITECTURES") == 1


def test_switching_back_and_forth_finds_the_same_build(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_ARCH", "89")
    seen = []
    for name in ("cuda", "cpu", "cuda", "cpu"):
        bootstrap.choose_gpu(name)
        seen.append(bootstrap.build_folder().name)
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_packages_are_laid_out_as_a_toolkit(tmp_path: Path) -> None:
    packages, root = tmp_path / "packages", tmp_path / "cuda"
    program(packages, "bin/nvcc", NVCC_SAYS.format("13.5"))
    for folder in ("include", "nvvm", "lib"):
        (packages / folder).mkdir()
    (packages / "lib/libcublas.so.13").touch()
    for _ in range(2):
        gpu_build.lay_out(packages, root)
    assert gpu_build.toolkit_at(root) == gpu_build.Toolkit(root, (13, 5), None)
    assert (root / "lib64/libcublas.so").resolve() == (packages / "lib/libcublas.so.13").resolve()
    # A program linked with the stub asks for the driver's library; beside the stub there must be none, it would be found first.
    stub = root / "lib/stubs/libcuda.so"
    assert b"libcuda.so.1" in stub.read_bytes()
    assert not list(root.rglob("libcuda.so.1"))
    assert subprocess.run(["nm", "-D", str(stub)], capture_output=True, text=True).stdout.count(" T cu") == len(
        gpu_build.LIBCUDA_NAMES
    )


@pytest.mark.parametrize(
    ("version", "cards", "word"),
    [
        ("6.0.2", ["gfx1100"], "6.1 or newer"),
        ("6.1.0", ["gfx1100", "gfx1030"], ""),
        ("6.3.1", ["gfx1201"], "too old for gfx1201: install 6.4"),
        ("7.0.0", ["gfx1201", "gfx1151"], ""),
        ("6.2.0-66", ["gfx1150"], "6.3 or newer"),
        ("", ["gfx1201"], ""),  # it does not say: CMake will
    ],
)
def test_rocm_is_compared_with_the_cards(version: str, cards: list[str], word: str) -> None:
    said = "; ".join(gpu_build.rocm_misfits(gpu_build.numbers(version), cards))
    assert (word in said) if word else not said


def test_make_rocm_says_what_does_not_fit_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a whole ROCm is: its version, its libraries and the names of cards are compared before anything is compiled."""
    for file in ("bin/hipcc", "lib/cmake/hipblas/hipblas-config.cmake", "lib/cmake/rocblas/rocblas-config.cmake"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / ".info").mkdir()
    (tmp_path / ".info" / "version").write_text("6.2.4-129\n")
    monkeypatch.setattr(gpu_build, "KFD", tmp_path / "no-cards")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    for named, said in (
        ("", "amdgpu driver shows none"),
        ("gfx1201", "ROCm 6.2 is too old for gfx1201"),
        ("7900", "'7900' is no architecture"),
    ):
        monkeypatch.setenv("GPU_ARCH", named)
        with pytest.raises(SetupError, match=said) as refused:
            bootstrap.prepare_rocm("rocm", "")
        assert refused.value.args[1], "the way out"
    monkeypatch.setenv("GPU_ARCH", "gfx1100,gfx1032")
    assert bootstrap.prepare_rocm("rocm", "") == "-DGPU_TARGETS=gfx1100;gfx1032"
    kernels = tmp_path / "lib" / "rocblas" / "library"
    kernels.mkdir(parents=True)
    (kernels / "TensileLibrary_lazy_gfx1100.dat").touch()
    with pytest.raises(SetupError, match="rocBLAS has no kernels for gfx1032"):
        bootstrap.prepare_rocm("rocm", "")
    (tmp_path / "bin/hipcc").unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="hipcc not found"):
        bootstrap.prepare_rocm("rocm", "")


def test_amd_cards_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, number in enumerate((0, 110000, 90010, 100302, 110000)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {number}\n")
    monkeypatch.setattr(gpu_build, "KFD", tmp_path)
    assert gpu_build.amd_architectures() == ["gfx1032", "gfx1100", "gfx90a"]


def test_vulkan_drivers_that_compute_on_the_cpu_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lvp_icd.x86_64.json", "radeon_icd.x86_64.json"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpu_build, "VULKAN_DRIVERS", (str(tmp_path),))
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    assert gpu_build.vulkan_drivers() == ["radeon_icd.x86_64"]


def test_cmake_is_told_where_a_named_loader_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FindVulkan looks into the folder's `lib` only, not into Debian's below it."""
    loader = tmp_path / "lib" / "x86_64-linux-gnu" / "libvulkan.so"
    loader.parent.mkdir(parents=True)
    loader.touch()
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    assert bootstrap.vulkan_loader() == f"-DVulkan_LIBRARY={loader}"
    monkeypatch.setattr(bootstrap, "gpu_prefixes", lambda _: ["/usr", str(tmp_path)])
    assert bootstrap.vulkan_loader() == "", "the system's is found anyway"
