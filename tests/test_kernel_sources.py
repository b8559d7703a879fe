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

PARALLEL_FOR = """
#include <cstdio>
#include <cstdlib>
#include "operator.h"
using namespace molmo::ort;
int main() {
    static const char* message = nullptr;  // of a fake ONNX Runtime: a status is a pointer to its message
    static int made = 0, freed = 0;
    OrtApi api{};
    api.functions[kCreateStatus] = reinterpret_cast<OrtFunction>(+[](int, const char* text) {
        std::printf("%s\\n", text);
        return reinterpret_cast<OrtStatus*>(&made);
    });
    api.functions[kGetMessage] = reinterpret_cast<OrtFunction>(+[](const OrtStatus*) { return message; });
    api.functions[kReleaseStatus] = reinterpret_cast<OrtFunction>(+[](OrtStatus*) { ++freed; });
    api.functions[kParallelFor] = reinterpret_cast<OrtFunction>(
        +[](const OrtKernelContext*, void (*run)(void*, size_t), size_t, size_t, void* work) -> OrtStatus* {
            if (message == nullptr) run(work, 0);
            return message == nullptr ? nullptr : reinterpret_cast<OrtStatus*>(&made);
        });
    for (const char* text : {static_cast<const char*>(nullptr), "no threads"}) {
        message = text;
        int tasks = 0;
        OrtStatus* status = guarded(&api, [&]() -> OrtStatus* {
            Pool pool = {&api, nullptr};
            molmo::each(pool.parallel(), 5, [&](int64_t) { ++tasks; });
            return nullptr;
        });
        std::printf("%d %d %d\\n", tasks, status != nullptr, freed);
    }
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


def test_a_thread_pool_that_fails_is_an_error(tmp_path: Path) -> None:
    compiled("-o", str(tmp_path / "pool"), source=PARALLEL_FOR)
    shown = subprocess.run([tmp_path / "pool"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert shown.splitlines() == ["5 0 0", "molmo_edge: no threads", "0 1 1"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86-64 only")
def test_a_compiler_without_bfloat16_leaves_it_out() -> None:
    def macros(version: int) -> set[str]:
        changed = ("-U__GNUC__", f"-D__GNUC__={version}", "-U__clang__", "-U__apple_build_version__")
        lines = compiled(*changed, "-E", "-dM", source='#include "kernels.h"').splitlines()
        return {line.split()[1] for line in lines} & {"MOLMO_X86", "MOLMO_BFLOAT16", "MOLMO_AMX"}

    assert macros(9) == {"MOLMO_X86"}
    assert {"MOLMO_X86", "MOLMO_BFLOAT16"} <= macros(10)
