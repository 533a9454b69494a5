"""Our occupancy against NVIDIA's own calculator, a header that Triton's package carries."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from peftkern.runtime.targets import ARCHITECTURES, Architecture, occupancy
from tests.native.compiled import CXX

REGISTERS = (16, 32, 40, 64, 72, 96, 128, 168, 255)
SHARED = (
    0,
    256,
    1024,
    8192,
    16385,
    40000,
    48 * 1024,
    64 * 1024,
    99 * 1024,
    99 * 1024 + 1,
    163 * 1024,
    163 * 1024 + 1,
    227 * 1024,
)
WARPS = (1, 2, 3, 4, 8, 16, 32)
PROGRAM = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int sm, warps_per_sm, registers, warps;
  size_t per_block, per_sm, reserved, shared;
  while (std::scanf("%d %d %zu %zu %zu %d %zu %d",
                    &sm, &warps_per_sm, &per_block, &per_sm, &reserved, &registers, &shared, &warps) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = sm / 10, device.computeMinor = sm % 10, device.warpSize = 32, device.numSms = 1;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * warps_per_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerBlock = 48 * 1024, device.sharedMemPerBlockOptin = per_block;
    device.sharedMemPerMultiprocessor = per_sm, device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.numBlockBarriers = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = per_block;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const int status =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, 32 * warps, shared);
    std::printf("%d %d\\n", status, status ? 0 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.fixture(scope="module")
def calculator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    triton = pytest.importorskip(
        "triton", reason="Triton, whose package carries cuda_occupancy.h, is not installed here"
    )
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run(
        [*CXX, "-w", f"-I{headers}", str(folder / "main.cpp"), "-o", str(folder / "main")], check=True
    )
    return folder / "main"


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=lambda arch: f"sm{arch.sm}")
def test_as_the_calculator_of_cuda(arch: Architecture, calculator: Path) -> None:
    cases = list(itertools.product(REGISTERS, SHARED, WARPS))
    limits = (arch.sm, arch.warps_per_sm, arch.shared_per_block, arch.shared_per_sm, arch.shared_reserved)
    lines = "\n".join(" ".join(map(str, (*limits, *case))) for case in cases)
    told = [
        line.split()
        for line in subprocess.run(
            [calculator], input=lines, check=True, capture_output=True, text=True
        ).stdout.splitlines()
    ]
    ours = [
        occupancy(arch, registers=registers, shared=shared, warps=warps).blocks
        for registers, shared, warps in cases
    ]
    wrong = [
        (case, got, line)
        for case, got, line in zip(cases, ours, told, strict=True)
        if line != ["0", str(got)]
    ]
    assert not wrong, (
        f"{len(wrong)} of {len(cases)}, such as (registers, shared, warps), ours, [status, CUDA's]: "
        f"{wrong[:5]}"
    )
