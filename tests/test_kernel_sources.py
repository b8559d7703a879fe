"""Sources of the compiled kernels, by small programs that are compiled here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "kernels" / "src"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

REQUESTS = """
#include <cstdint>
#include <cstdio>
#include "read_ahead.h"
namespace molmo {
bool reads_from_disk() { return true; }
void request(const void* data, size_t size) { std::printf("%zu %zu\\n", size_t(data), size); }
}
int main() {
    const auto at = [](uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); };
    molmo::request({at(1000), at(2000), at(3000), 48, 96, 32, true});
    molmo::request({at(1000), at(2000), nullptr, 48, 96, 32, false});
}
"""


def compiled(*arguments: str, source: str = "") -> str:
    command = [str(COMPILER), "-std=c++17", f"-I{SOURCES}", "-x", "c++", "-", *arguments]
    found = subprocess.run(command, check=True, input=source, capture_output=True, text=True, timeout=120)
    return found.stdout


def test_everything_that_a_matrix_reads_is_requested(tmp_path: Path) -> None:
    compiled("-o", str(tmp_path / "requests"), source=REQUESTS)
    shown = subprocess.run([tmp_path / "requests"], check=True, capture_output=True, text=True, timeout=60).stdout
    codes, blocks = 48 * 96 // 2, 48 * 3
    asked = [tuple(map(int, line.split())) for line in shown.splitlines()]
    assert asked[:3] == [(1000, codes), (2000, 2 * blocks), (3000, 48 * 2)]  # two zero points a byte
    assert asked[3:] == [(1000, codes), (2000, 4 * blocks)]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86-64 only")
def test_a_compiler_without_bfloat16_leaves_it_out() -> None:
    def macros(version: int) -> set[str]:
        changed = ("-U__GNUC__", f"-D__GNUC__={version}", "-U__clang__", "-U__apple_build_version__")
        lines = compiled(*changed, "-E", "-dM", source='#include "kernels.h"').splitlines()
        return {line.split()[1] for line in lines} & {"MOLMO_X86", "MOLMO_BFLOAT16", "MOLMO_AMX"}

    assert macros(9) == {"MOLMO_X86"}
    assert {"MOLMO_X86", "MOLMO_BFLOAT16"} <= macros(10)
