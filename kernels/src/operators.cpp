// The operators of the domain "molmo_edge": ONNX Runtime's MatMulNBits and QMoE under the same names, inputs and
// attributes, and those of cached_attention_operator.h and vision_operators.h.
//
// molmo_edge.runtimes.kernels moves a node to this domain if it is of the kind that these operators compute: four bits,
// accuracy_level 4, blocks of 32, 64 or 128, rows a multiple of the block and columns of 16; experts with swiglu.
#include <mutex>

#include "cached_attention_operator.h"
#include "operator.h"
#include "products.h"
#include "vision_operators.h"

#ifdef _WIN32
#define MOLMO_EXPORT extern "C" __declspec(dllexport)
#else
#define MOLMO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace molmo::ort {
namespace {

bool is_matrix(const Tensor& codes, const Tensor& scales, const Tensor& zero_points) {
    return codes.data != nullptr && codes.type == kBytes && (scales.type == kFloat || scales.type == kHalf) &&
           (zero_points.data == nullptr || zero_points.type == kBytes);
}

Matrix matrix(const Tensor& codes, const Tensor& scales, const Tensor& zero_points, int64_t columns, int64_t inner,
              int64_t block) {
    return {static_cast<const uint8_t*>(codes.data), scales.data, static_cast<const uint8_t*>(zero_points.data),
            columns, inner, block, scales.type == kHalf};
}

bool fits(int64_t columns, int64_t inner, int64_t block) {
    return block >= 32 && block % 32 == 0 && inner > 0 && inner % block == 0 && columns > 0 && columns % kColumns == 0;
}

struct MatMul {
    static constexpr const char* kName = "MatMulNBits";
    static constexpr size_t kInputs = 4, kOutputs = 1;
    static int type(size_t index) { return index == 0 ? kFloat : index == 2 ? kAnyType : kBytes; }
    static bool optional(size_t index) { return index == 3; }
    static int output_type(size_t) { return kFloat; }

    const OrtApi* api;
    int64_t inner = 0, columns = 0, block = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        MOLMO_TRY((call<kGetInteger>(api, info, "K", &inner)));
        MOLMO_TRY((call<kGetInteger>(api, info, "N", &columns)));
        MOLMO_TRY((call<kGetInteger>(api, info, "block_size", &block)));
        return fits(columns, inner, block) ? nullptr : failed(api, "molmo_edge MatMulNBits: unsupported sizes");
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Tensor x, codes, scales, zero_points;
        MOLMO_TRY(input(api, context, 0, x));
        MOLMO_TRY(input(api, context, 1, codes));
        MOLMO_TRY(input(api, context, 2, scales));
        MOLMO_TRY(input(api, context, 3, zero_points));
        if (!is_matrix(codes, scales, zero_points) || x.shape.empty() || x.shape.back() != inner)
            return failed(api, "molmo_edge MatMulNBits: unsupported inputs");
        const int64_t rows = rows_of(x);
        std::vector<int64_t> shape = x.shape;
        shape.back() = columns;
        float* out = nullptr;
        MOLMO_TRY(output(api, context, 0, shape, out));
        Pool pool = {api, context};
        multiply(kernel(), pool.parallel(), static_cast<const float*>(x.data), rows,
                 matrix(codes, scales, zero_points, columns, inner, block), out);
        return nullptr;
    }
};

struct Moe {
    static constexpr const char* kName = "QMoE";
    static constexpr size_t kInputs = 15, kOutputs = 1;
    enum : size_t { kX, kProbabilities, kCodes1, kScales1, kCodes2 = 5, kScales2, kZero1 = 11, kZero2, kWeights = 14 };
    static int type(size_t index) {
        switch (index) {
            case kScales1: case kScales2: return kAnyType;
            case kCodes1: case kCodes2: case kZero1: case kZero2: return kBytes;
            default: return kFloat;
        }
    }
    static bool optional(size_t index) { return index == 4 || (index > kScales2 && index != kWeights); }
    static int output_type(size_t) { return kFloat; }

    const OrtApi* api;
    int64_t chosen = 0, block = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        MOLMO_TRY((call<kGetInteger>(api, info, "k", &chosen)));
        return call<kGetInteger>(api, info, "block_size", &block);
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Tensor x, probabilities, codes_1, scales_1, zero_1, codes_2, scales_2, zero_2, weights;
        MOLMO_TRY(input(api, context, kX, x));
        MOLMO_TRY(input(api, context, kProbabilities, probabilities));
        MOLMO_TRY(input(api, context, kCodes1, codes_1));
        MOLMO_TRY(input(api, context, kScales1, scales_1));
        MOLMO_TRY(input(api, context, kZero1, zero_1));
        MOLMO_TRY(input(api, context, kCodes2, codes_2));
        MOLMO_TRY(input(api, context, kScales2, scales_2));
        MOLMO_TRY(input(api, context, kZero2, zero_2));
        MOLMO_TRY(input(api, context, kWeights, weights));
        const bool known = is_matrix(codes_1, scales_1, zero_1) && is_matrix(codes_2, scales_2, zero_2) &&
                           codes_1.shape.size() == 3 && codes_2.shape.size() == 3 && !x.shape.empty() &&
                           probabilities.shape.size() == 2 && weights.shape == probabilities.shape;
        if (!known) return failed(api, "molmo_edge QMoE: unsupported inputs");
        const int64_t count = codes_1.shape[0], width = codes_1.shape[1], inner = x.shape.back(), hidden = width / 2;
        const int64_t rows = rows_of(x);
        const bool sizes = fits(width, inner, block) && fits(inner, hidden, block) && codes_1.shape[2] == inner / 2 &&
                           codes_2.shape == std::vector<int64_t>{count, inner, hidden / 2} && chosen > 0 &&
                           chosen <= count && probabilities.shape[0] == rows && probabilities.shape[1] == count;
        if (!sizes) return failed(api, "molmo_edge QMoE: unsupported sizes");
        float* out = nullptr;
        MOLMO_TRY(output(api, context, 0, x.shape, out));
        if (rows == 0) return nullptr;
        const Experts layer = {matrix(codes_1, scales_1, zero_1, width, inner, block),
                               matrix(codes_2, scales_2, zero_2, inner, hidden, block), count, chosen};
        Pool pool = {api, context};
        experts(kernel(), pool.parallel(), static_cast<const float*>(x.data), rows,
                static_cast<const float*>(probabilities.data), static_cast<const float*>(weights.data), layer, out);
        return nullptr;
    }
};

}  // namespace
}  // namespace molmo::ort

MOLMO_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace molmo::ort;
    const OrtApi* api = base->GetApi(kVersion);
    if (api == nullptr) return nullptr;  // older than every version that molmo_edge.runtimes.kernels accepts
    static Registered<MatMul> matmul(api);
    static Registered<Moe> moe(api);
    static Registered<GroupQueryAttention> cached(api);
    static Registered<Attention> attention(api);
    static Registered<QuantizeRows> rows(api);
    static Registered<QuantizedLinear> linear(api);
    moe.InferOutputShapeFn = same_shape<Moe>;
    cached.InferOutputShapeFn = GroupQueryAttention::infer_shape;
    attention.InferOutputShapeFn = same_shape<Attention>;
    static std::mutex lock;  // sessions load on several threads
    static OrtCustomOpDomain* domain = nullptr;  // for all sessions of the process, which the library outlives
    const std::lock_guard<std::mutex> guard(lock);
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        MOLMO_TRY((call<kCreateCustomOpDomain>(api, "molmo_edge", &made)));
        const OrtCustomOp* const operators[] = {&matmul, &moe, &cached, &attention, &rows, &linear};
        for (const OrtCustomOp* op : operators)
            MOLMO_TRY((call<kAddToDomain>(api, made, op)));
        domain = made;
    }
    return call<kAddDomain>(api, options, domain);
}
