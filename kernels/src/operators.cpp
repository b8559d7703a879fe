// ONNX Runtime's MatMulNBits and QMoE under the same names, inputs and attributes, in the domain "molmo_edge".
//
// molmo_edge.runtimes.kernels moves a node to this domain if it is of the kind that these operators compute: four bits,
// accuracy_level 4, blocks of 32, 64 or 128, rows a multiple of the block and columns of 16; experts with swiglu.
#include <exception>
#include <mutex>
#include <vector>

#include "onnxruntime_abi.h"
#include "products.h"

#ifdef _WIN32
#define MOLMO_EXPORT extern "C" __declspec(dllexport)
#else
#define MOLMO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace molmo::ort {
namespace {

#define MOLMO_TRY(expression) \
    if (OrtStatus* status = (expression)) return status

OrtStatus* failed(const OrtApi* api, const char* message) {
    return reinterpret_cast<OrtStatus*(MOLMO_CALL*)(int, const char*)>(api->functions[kCreateStatus])(1, message);
}

struct Tensor {
    void* data = nullptr;  // null: an absent input
    int type = kAnyType;
    std::vector<int64_t> shape;
};

OrtStatus* dimensions(const OrtApi* api, const OrtShape* shape, std::vector<int64_t>& out) {
    size_t rank = 0;
    MOLMO_TRY((call<kGetRank>(api, shape, &rank)));
    out.resize(rank);
    return call<kGetDimensions>(api, shape, out.data(), rank);
}

OrtStatus* input(const OrtApi* api, const OrtKernelContext* context, size_t index, Tensor& out) {
    size_t count = 0;
    const OrtValue* value = nullptr;
    MOLMO_TRY((call<kGetInputCount>(api, context, &count)));
    if (index >= count) return nullptr;
    MOLMO_TRY((call<kGetInput>(api, context, index, &value)));
    if (value == nullptr) return nullptr;
    OrtShape* shape = nullptr;
    MOLMO_TRY((call<kGetShape>(api, value, &shape)));
    OrtStatus* status = call<kGetType>(api, const_cast<const OrtShape*>(shape), &out.type);
    if (status == nullptr) status = dimensions(api, shape, out.shape);
    release<kReleaseShape>(api, shape);
    if (status != nullptr) return status;
    return call<kGetData>(api, const_cast<OrtValue*>(value), &out.data);
}

OrtStatus* output(const OrtApi* api, OrtKernelContext* context, const std::vector<int64_t>& shape, float*& out) {
    OrtValue* value = nullptr;
    void* data = nullptr;
    MOLMO_TRY((call<kGetOutput>(api, context, size_t{0}, shape.data(), shape.size(), &value)));
    MOLMO_TRY((call<kGetData>(api, value, &data)));
    out = static_cast<float*>(data);
    return nullptr;
}

int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) rows *= x.shape[i];
    return rows;
}

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

// The thread pool of the session.
struct Pool {
    const OrtApi* api;
    const OrtKernelContext* context;

    Parallel parallel() {
        return {this, [](void* pool, int64_t count, void (*run)(void*, size_t), void* work) {
            const Pool& own = *static_cast<Pool*>(pool);
            // As many calls as threads could take part; each works until no task is left.
            const size_t calls = size_t(count < 128 ? count : 128);
            if (call<kParallelFor>(own.api, own.context, run, calls, size_t{0}, work) != nullptr) run(work, 0);
        }};
    }
};

struct MatMul {
    static constexpr const char* kName = "MatMulNBits";
    static constexpr size_t kInputs = 4;
    static int type(size_t index) { return index == 0 ? kFloat : index == 2 ? kAnyType : kBytes; }
    static bool optional(size_t index) { return index == 3; }

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
        MOLMO_TRY(output(api, context, shape, out));
        Pool pool = {api, context};
        multiply(kernel(), pool.parallel(), static_cast<const float*>(x.data), rows,
                 matrix(codes, scales, zero_points, columns, inner, block), out);
        return nullptr;
    }
};

struct Moe {
    static constexpr const char* kName = "QMoE";
    static constexpr size_t kInputs = 15;
    enum : size_t { kX, kProbabilities, kCodes1, kScales1, kCodes2 = 5, kScales2, kZero1 = 11, kZero2, kWeights = 14 };
    static int type(size_t index) {
        switch (index) {
            case kScales1: case kScales2: return kAnyType;
            case kCodes1: case kCodes2: case kZero1: case kZero2: return kBytes;
            default: return kFloat;
        }
    }
    static bool optional(size_t index) { return index == 4 || (index > kScales2 && index != kWeights); }

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
        MOLMO_TRY(output(api, context, x.shape, out));
        if (rows == 0) return nullptr;
        const Experts layer = {matrix(codes_1, scales_1, zero_1, width, inner, block),
                               matrix(codes_2, scales_2, zero_2, inner, hidden, block), count, chosen};
        Pool pool = {api, context};
        experts(kernel(), pool.parallel(), static_cast<const float*>(x.data), rows,
                static_cast<const float*>(probabilities.data), static_cast<const float*>(weights.data), layer, out);
        return nullptr;
    }
};

// The output has the shape of the first input, for MatMulNBits with N columns. Without it the optimizations of ONNX
// Runtime that need to know shapes would stop here.
template <typename Op>
struct Registered : OrtCustomOp {
    const OrtApi* api;

    explicit Registered(const OrtApi* given) : OrtCustomOp{}, api(given) {
        version = kVersion;
        GetName = [](const OrtCustomOp*) { return Op::kName; };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        GetInputType = [](const OrtCustomOp*, size_t index) { return Op::type(index); };
        GetInputTypeCount = [](const OrtCustomOp*) { return Op::kInputs; };
        GetOutputType = [](const OrtCustomOp*, size_t) { return kFloat; };
        GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t index) { return Op::optional(index) ? 1 : 0; };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
        CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* own, const OrtKernelInfo* info, void** made) -> OrtStatus* {
            Op op{own};
            MOLMO_TRY(op.read(info));
            *made = new Op(op);
            return nullptr;
        };
        KernelComputeV2 = [](void* op, OrtKernelContext* context) -> OrtStatus* {
            const Op& own = *static_cast<Op*>(op);
            try {
                return own.compute(context);
            } catch (const std::exception& error) {
                return failed(own.api, error.what());
            }
        };
        KernelDestroy = [](void* op) { delete static_cast<Op*>(op); };
    }
};

OrtStatus* same_shape(const OrtCustomOp* op, OrtShapeContext* context) {
    const OrtApi* api = static_cast<const Registered<Moe>*>(op)->api;
    OrtShape* shape = nullptr;  // owned by the context
    MOLMO_TRY((call<kGetInputShape>(api, const_cast<const OrtShapeContext*>(context), size_t{0}, &shape)));
    return call<kSetOutputShape>(api, const_cast<const OrtShapeContext*>(context), size_t{0},
                                 const_cast<const OrtShape*>(shape));
}

}  // namespace
}  // namespace molmo::ort

MOLMO_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace molmo::ort;
    const OrtApi* api = base->GetApi(kVersion);
    if (api == nullptr) return nullptr;  // older than every version that molmo_edge.runtimes.kernels accepts
    static Registered<MatMul> matmul(api);
    static Registered<Moe> moe(api);
    moe.InferOutputShapeFn = same_shape;
    static std::mutex lock;  // sessions load on several threads
    static OrtCustomOpDomain* domain = nullptr;  // for all sessions of the process, which the library outlives
    const std::lock_guard<std::mutex> guard(lock);
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        MOLMO_TRY((call<kCreateCustomOpDomain>(api, "molmo_edge", &made)));
        MOLMO_TRY((call<kAddToDomain>(api, made, static_cast<const OrtCustomOp*>(&matmul))));
        MOLMO_TRY((call<kAddToDomain>(api, made, static_cast<const OrtCustomOp*>(&moe))));
        domain = made;
    }
    return call<kAddDomain>(api, options, domain);
}
