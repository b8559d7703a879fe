// Which kernel this processor and its operating system support.
#include <cstdlib>

#include "kernels.h"

#ifdef MOLMO_X86
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#ifdef MOLMO_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(MOLMO_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(MOLMO_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace molmo {
namespace {

struct Choice {
    const Kernel* kernel;
    bool (*supported)();
};

bool always() { return true; }

#ifdef MOLMO_X86
struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
#ifdef _MSC_VER
    int out[4];
    __cpuidex(out, int(leaf), int(subleaf));
    r.a = uint32_t(out[0]), r.b = uint32_t(out[1]), r.c = uint32_t(out[2]), r.d = uint32_t(out[3]);
#else
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

uint64_t saved_by_system() {  // the registers that the operating system keeps for a program
    if (!bit(cpuid(1, 0).c, 27)) return 0;
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
#endif
}

bool has_avx2() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
    return (saved_by_system() & 6) == 6 && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);
}

#ifdef MOLMO_AVXVNNI_COMPILES
bool has_avx_vnni() { return has_avx2() && bit(cpuid(7, 1).a, 4); }
#endif

bool has_avx512() {
    const Registers seven = cpuid(7, 0);
    return has_avx2() && (saved_by_system() & 0xe6) == 0xe6 && bit(seven.b, 16) && bit(seven.b, 17) &&
           bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
}

#endif

#ifdef MOLMO_BFLOAT16
bool has_bfloat16() { return has_avx512() && bit(cpuid(7, 1).a, 5); }
#endif

#ifdef MOLMO_AMX
bool has_amx() {
    const Registers seven = cpuid(7, 0);
    constexpr int kAskForTiles = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; it holds for the whole process
    return has_bfloat16() && bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25) &&
           (saved_by_system() & 0x60000) == 0x60000 &&
           syscall(SYS_arch_prctl, kAskForTiles, kTileData) == 0;
}
#endif

#ifdef MOLMO_ARM
#if defined(__linux__)
bool has_dot() { return (getauxval(AT_HWCAP) >> 20) & 1; }    // HWCAP_ASIMDDP
bool has_i8mm() { return has_dot() && ((getauxval(AT_HWCAP2) >> 13) & 1); }  // HWCAP2_I8MM
#elif defined(__APPLE__)
bool feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dot() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dot() && feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dot() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

// The fastest first.
const Choice kChoices[] = {
#ifdef MOLMO_AMX
    {&kAmx, has_amx},
#endif
#ifdef MOLMO_BFLOAT16
    {&kAvx512Bf16, has_bfloat16},
#endif
#ifdef MOLMO_X86
    {&kAvx512, has_avx512},
#endif
#ifdef MOLMO_AVXVNNI_COMPILES
    {&kAvxVnni, has_avx_vnni},
#endif
#ifdef MOLMO_X86
    {&kAvx2, has_avx2},
#endif
#ifdef MOLMO_ARM
    {&kNeonI8mm, has_i8mm},   {&kNeonDot, has_dot},
#endif
    {&kPlain, always},
};

const Kernel& choose() {
    if (const char* name = std::getenv("MOLMO_EDGE_KERNEL"))
        if (const Kernel* named = kernel_named(name)) return *named;
    for (const Choice& choice : kChoices)
        if (choice.supported()) return *choice.kernel;
    return kPlain;
}

}  // namespace

const Kernel* kernel_named(const char* name) {
    for (const Choice& choice : kChoices)
        if (std::strcmp(choice.kernel->name, name) == 0) return choice.supported() ? choice.kernel : nullptr;
    return nullptr;
}

const Kernel& kernel() {
    static const Kernel& chosen = choose();
    return chosen;
}

}  // namespace molmo
