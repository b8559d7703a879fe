// The kernels that this file's users may choose from. Those of another architecture are not compiled.
#pragma once

#include "common.h"

#if defined(__x86_64__) || defined(_M_X64)
#define MOLMO_X86 1
#elif (defined(__aarch64__) || defined(_M_ARM64)) && (defined(__GNUC__) || defined(__clang__))
#define MOLMO_ARM 1
#endif
#if defined(MOLMO_X86) && (defined(__GNUC__) || defined(__clang__))
#define MOLMO_BFLOAT16 1  // other compilers have other types for it
#endif
#if defined(MOLMO_X86) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
#define MOLMO_AMX 1  // inline assembly, and Linux must be asked for the tiles
#endif

namespace molmo {

extern const Kernel kPlain;
#ifdef MOLMO_X86
extern const Kernel kAvx2, kAvxVnni, kAvx512;
#endif
#ifdef MOLMO_BFLOAT16
extern const Kernel kAvx512Bf16;
#endif
#ifdef MOLMO_AMX
extern const Kernel kAmx;
#endif
#ifdef MOLMO_ARM
extern const Kernel kNeonDot, kNeonI8mm;
#endif

}  // namespace molmo
