// What operators of ONNX Runtime share: reading inputs, writing outputs, the thread pool, registration.
#pragma once

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "parallel.h"

namespace molmo::ort {
#define MOLMO_TRY(expression) \
    if (OrtStatus* status = (expression)) return status

inline OrtStatus* failed(const OrtApi* api, const char* message) {
    return reinterpret_cast<OrtStatus*(MOLMO_CALL*)(int, const char*)>(api->functions[kCreateStatus])(1, message);
}

// run(), which returns a status. An exception becomes a status: none may cross the C interface.
template <typename Run>
OrtStatus* guarded(const OrtApi* api, const Run& run) {
    try {
        return run();
    } catch (const std::exception& error) {
        return failed(api, error.what());
    } catch (...) {
        return failed(api, "molmo_edge: unknown exception");
    }
}

// Throws the message of a status that is an error, and frees the status.
inline void check(const OrtApi* api, OrtStatus* status) {
    if (status == nullptr) return;
    const auto free = [api](OrtStatus* owned) { release<kReleaseStatus>(api, owned); };
    const std::unique_ptr<OrtStatus, decltype(free)> owned(status, free);
    const auto message = reinterpret_cast<const char*(MOLMO_CALL*)(const OrtStatus*)>(api->functions[kGetMessage]);
    throw std::runtime_error(std::string("molmo_edge: ") + message(status));
}

struct Tensor {
    void* data = nullptr;  // null: an absent input
    int type = kAnyType;
    std::vector<int64_t> shape;
};

inline OrtStatus* dimensions(const OrtApi* api, const OrtShape* shape, std::vector<int64_t>& out) {
    size_t rank = 0;
    MOLMO_TRY((call<kGetRank>(api, shape, &rank)));
    out.resize(rank);
    return call<kGetDimensions>(api, shape, out.data(), rank);
}

inline OrtStatus* tensor(const OrtApi* api, const OrtValue* value, Tensor& out) {
    OrtShape* shape = nullptr;
    MOLMO_TRY((call<kGetShape>(api, value, &shape)));
    OrtStatus* status = call<kGetType>(api, const_cast<const OrtShape*>(shape), &out.type);
    if (status == nullptr) status = dimensions(api, shape, out.shape);
    release<kReleaseShape>(api, shape);
    if (status != nullptr) return status;
    return call<kGetData>(api, const_cast<OrtValue*>(value), &out.data);
}

inline OrtStatus* input(const OrtApi* api, const OrtKernelContext* context, size_t index, Tensor& out) {
    size_t count = 0;
    const OrtValue* value = nullptr;
    MOLMO_TRY((call<kGetInputCount>(api, context, &count)));
    if (index >= count) return nullptr;
    MOLMO_TRY((call<kGetInput>(api, context, index, &value)));
    return value == nullptr ? nullptr : tensor(api, value, out);
}

// An input that never changes
inline OrtStatus* constant(const OrtApi* api, const OrtKernelInfo* info, size_t index, Tensor& out) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    MOLMO_TRY((call<kGetConstant>(api, info, index, &is_constant, &value)));
    return is_constant == 0 || value == nullptr ? nullptr : tensor(api, value, out);
}

// Whether a node has an input, constant or not. An optional one may be absent.
inline OrtStatus* has_input(const OrtApi* api, const OrtKernelInfo* info, size_t index, bool& out) {
    size_t count = 0, size = 0;
    MOLMO_TRY((call<kGetNodeInputCount>(api, info, &count)));
    if (index < count) MOLMO_TRY((call<kGetNodeInputName>(api, info, index, static_cast<char*>(nullptr), &size)));
    out = size > 1;  // with the zero at its end; the name of an absent input is empty
    return nullptr;
}

template <typename T>
OrtStatus* output(const OrtApi* api, OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape, T*& out) {
    OrtValue* value = nullptr;
    void* data = nullptr;
    MOLMO_TRY((call<kGetOutput>(api, context, index, shape.data(), shape.size(), &value)));
    MOLMO_TRY((call<kGetData>(api, value, &data)));
    out = static_cast<T*>(data);
    return nullptr;
}

inline int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) rows *= x.shape[i];
    return rows;
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
            check(own.api, call<kParallelFor>(own.api, own.context, run, calls, size_t{0}, work));
        }};
    }
};

// An operator of the class Op, which has kName, kInputs, kOutputs, type, optional, output_type, read and compute.
template <typename Op>
struct Registered : OrtCustomOp {
    const OrtApi* api;

    explicit Registered(const OrtApi* given) : OrtCustomOp{}, api(given) {
        version = kVersion;
        GetName = [](const OrtCustomOp*) { return Op::kName; };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        GetInputType = [](const OrtCustomOp*, size_t index) { return Op::type(index); };
        GetInputTypeCount = [](const OrtCustomOp*) { return Op::kInputs; };
        GetOutputType = [](const OrtCustomOp*, size_t index) { return Op::output_type(index); };
        GetOutputTypeCount = [](const OrtCustomOp*) { return Op::kOutputs; };
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
            return guarded(own, [&]() -> OrtStatus* {
                Op op{};
                op.api = own;
                MOLMO_TRY(op.read(info));
                *made = new Op(op);
                return nullptr;
            });
        };
        KernelComputeV2 = [](void* op, OrtKernelContext* context) -> OrtStatus* {
            const Op& own = *static_cast<Op*>(op);
            return guarded(own.api, [&] { return own.compute(context); });
        };
        KernelDestroy = [](void* op) { delete static_cast<Op*>(op); };
    }
};

// Dimensions of an input while a graph is loaded; those that are not numbers are -1.
inline OrtStatus* input_shape(const OrtApi* api, const OrtShapeContext* context, size_t index, OrtShape*& out,
                              std::vector<int64_t>& sizes) {
    MOLMO_TRY((call<kGetInputShape>(api, context, index, &out)));  // owned by the context
    return dimensions(api, out, sizes);
}

// Say that output 0 has a shape. Without it the optimizations of ONNX Runtime that need to know shapes would stop here. A
// dimension with neither a size nor a name would be taken for the size -1.
inline OrtStatus* set_output_shape(const OrtApi* api, const OrtShapeContext* context, const OrtShape* shape,
                                   const std::vector<int64_t>& sizes) {
    std::vector<const char*> names(sizes.size());
    MOLMO_TRY((call<kGetSymbols>(api, shape, names.data(), names.size())));
    for (size_t i = 0; i < sizes.size(); ++i)
        if (sizes[i] < 0 && (names[i] == nullptr || *names[i] == 0)) return nullptr;
    return call<kSetOutputShape>(api, context, size_t{0}, shape);
}

// The output has the shape of the first input.
template <typename Op>
OrtStatus* same_shape(const OrtCustomOp* op, OrtShapeContext* context) {
    const OrtApi* api = static_cast<const Registered<Op>*>(op)->api;
    OrtShape* shape = nullptr;
    std::vector<int64_t> sizes;
    MOLMO_TRY(input_shape(api, context, 0, shape, sizes));
    if (sizes.empty()) return nullptr;  // not known
    return set_output_shape(api, context, shape, sizes);
}

}  // namespace molmo::ort
