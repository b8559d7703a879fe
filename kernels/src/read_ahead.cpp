#include "read_ahead.h"

#ifndef _WIN32
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace molmo {
namespace {

constexpr int kCalls = 64;  // for this many operators after a page fault that read from the disk

std::atomic<long> known_faults{0};
std::atomic<int> calls_left{0};

}  // namespace

bool reads_from_disk() {
    rusage usage{};
    if (getrusage(RUSAGE_SELF, &usage) != 0) return false;
    if (known_faults.exchange(usage.ru_majflt) != usage.ru_majflt) calls_left = kCalls;
    return calls_left > 0 && calls_left-- > 0;
}

void request(const void* data, size_t size) {
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(page - 1);
    const uintptr_t end = reinterpret_cast<uintptr_t>(data) + size;
    posix_madvise(reinterpret_cast<void*>(begin), end - begin, POSIX_MADV_WILLNEED);
}

}  // namespace molmo
#else

namespace molmo {

bool reads_from_disk() { return false; }
void request(const void*, size_t) {}

}  // namespace molmo
#endif
