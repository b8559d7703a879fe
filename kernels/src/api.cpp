// C functions for tests, benchmarks and `molmo-edge doctor`, which call them from Python.
#include "kernels.h"
#include "products.h"

#ifdef _WIN32
#define MOLMO_EXPORT extern "C" __declspec(dllexport)
#else
#define MOLMO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

const molmo::Parallel kAlone = {nullptr, [](void*, int64_t, void (*run)(void*, size_t), void* context) { run(context, 0); }};

}  // namespace

MOLMO_EXPORT const char* molmo_kernel_name() { return molmo::kernel().name; }

// Whether this processor has the kernel of this name.
MOLMO_EXPORT int molmo_has_kernel(const char* name) { return molmo::kernel_named(name) != nullptr; }

// Whether this processor has the kernel and the kernel computes the operator.
MOLMO_EXPORT int molmo_computes(const char* name, const char* operation) {
    const molmo::Kernel* kernel = molmo::kernel_named(name);
    if (kernel == nullptr) return 0;
    if (std::strcmp(operation, "MatMulNBits") == 0 || std::strcmp(operation, "QMoE") == 0) return 1;
    if (kernel->tiles == nullptr) return 0;
    if (std::strcmp(operation, "QuantizedLinear") == 0) return 1;
    if (kernel->tiles->bfloat16 == nullptr) return 0;
    return std::strcmp(operation, "MultiHeadAttention") == 0 || std::strcmp(operation, "GroupQueryAttention") == 0;
}

MOLMO_EXPORT int molmo_multiply(const char* name, const float* x, int64_t rows, const uint8_t* codes,
                                const float* scales, const uint8_t* zero_points, int64_t columns, int64_t inner,
                                int64_t block, float* out) {
    const molmo::Kernel* kernel = molmo::kernel_named(name);
    if (kernel == nullptr) return 1;
    molmo::multiply(*kernel, kAlone, x, rows, {codes, scales, zero_points, columns, inner, block, false}, out);
    return 0;
}

MOLMO_EXPORT int molmo_experts(const char* name, const float* x, int64_t rows, const float* probabilities,
                               const float* weights, int64_t experts, int64_t chosen, const uint8_t* codes_1,
                               const void* scales_1, const uint8_t* zero_1, const uint8_t* codes_2,
                               const void* scales_2, const uint8_t* zero_2, int64_t inner, int64_t hidden,
                               int64_t block, float* out) {
    const molmo::Kernel* kernel = molmo::kernel_named(name);
    if (kernel == nullptr) return 1;
    const molmo::Matrix first = {codes_1, scales_1, zero_1, 2 * hidden, inner, block, true};
    const molmo::Matrix second = {codes_2, scales_2, zero_2, inner, hidden, block, true};
    molmo::experts(*kernel, kAlone, x, rows, probabilities, weights, {first, second, experts, chosen}, out);
    return 0;
}
