// The kernels that this file's users may choose from. Those of another architecture are not compiled.
#pragma once

#include "common.h"

#if defined(__x86_64__) || defined(_M_X64)
#define MOLMO_X86 1
#elif (defined(__aarch64__) || defined(_M_ARM64)) && (defined(__GNUC__) || defined(__clang__))
#define MOLMO_ARM 1
#endif
// Types and instructions for bfloat16: GCC 10, Clang 9 and Apple's Clang 12 (LLVM 10) are the first that have them, and
// other compilers have other types.
#if defined(__apple_build_version__)
#define MOLMO_HAS_BFLOAT16 (__clang_major__ >= 12)
#elif defined(__clang__)
#define MOLMO_HAS_BFLOAT16 (__clang_major__ >= 9)
#elif defined(__GNUC__)
#define MOLMO_HAS_BFLOAT16 (__GNUC__ >= 10)
#else
#define MOLMO_HAS_BFLOAT16 0
#endif
// AVX-VNNI: GCC 11, Clang 12, Apple's Clang 13, Microsoft's compiler.
#if defined(MOLMO_X86)
#if defined(__apple_build_version__)
#define MOLMO_HAS_AVXVNNI (__clang_major__ >= 13)
#elif defined(__clang__)
#define MOLMO_HAS_AVXVNNI (__clang_major__ >= 12)
#elif defined(__GNUC__)
#define MOLMO_HAS_AVXVNNI (__GNUC__ >= 11)
#else
#define MOLMO_HAS_AVXVNNI 1
#endif
#if MOLMO_HAS_AVXVNNI
#define MOLMO_AVXVNNI_COMPILES 1
#endif
#endif
#if defined(MOLMO_X86) && MOLMO_HAS_BFLOAT16
#define MOLMO_BFLOAT16 1
#endif
#if defined(MOLMO_BFLOAT16) && defined(__linux__)
#define MOLMO_AMX 1  // inline assembly, and Linux must be asked for the tiles
#endif

namespace molmo {

extern const Kernel kPlain;
#ifdef MOLMO_X86
extern const Kernel kAvx2, kAvx512;
#endif
#ifdef MOLMO_AVXVNNI_COMPILES
extern const Kernel kAvxVnni;
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
