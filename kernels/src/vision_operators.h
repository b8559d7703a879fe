// The operators of vision towers. molmo_edge.runtimes.vision_graph puts them in the place of ONNX Runtime's.
#pragma once

#include <memory>

#include "operator.h"
#include "vision.h"

namespace molmo::ort {

// com.microsoft's MultiHeadAttention of q, k and v [batch, n, heads * width] without anything else.
struct Attention {
    static constexpr const char* kName = "MultiHeadAttention";
    static constexpr size_t kInputs = 3, kOutputs = 1;
    static int type(size_t) { return kFloat; }
    static bool optional(size_t) { return false; }
    static int output_type(size_t) { return kFloat; }

    const OrtApi* api;
    int64_t heads = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (kernel().tiles == nullptr || kernel().tiles->bfloat16 == nullptr)
            return failed(api, "molmo_edge MultiHeadAttention: not on this processor");
        return call<kGetInteger>(api, info, "num_heads", &heads);
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Tensor q, k, v;
        MOLMO_TRY(input(api, context, 0, q));
        MOLMO_TRY(input(api, context, 1, k));
        MOLMO_TRY(input(api, context, 2, v));
        const bool known = q.shape.size() == 3 && k.shape.size() == 3 && k.shape == v.shape && heads > 0 &&
                           q.shape[0] == k.shape[0] && q.shape[2] == k.shape[2] && q.shape[2] % heads == 0 &&
                           (k.shape[1] > 0 || q.shape[1] == 0);
        if (!known) return failed(api, "molmo_edge MultiHeadAttention: unsupported shapes");
        float* out = nullptr;
        MOLMO_TRY(output(api, context, 0, q.shape, out));
        Pool pool = {api, context};
        attention(kernel(), pool.parallel(),
                  {static_cast<const float*>(q.data), static_cast<const float*>(k.data), static_cast<const float*>(v.data),
                   q.shape[0], q.shape[1], k.shape[1], heads, q.shape[2] / heads},
                  out);
        return nullptr;
    }
};

// x [..., inner] -> its rows rounded to int8, in the layout of the kernel, and their scales [..., 1].
struct QuantizeRows {
    static constexpr const char* kName = "QuantizeRows";
    static constexpr size_t kInputs = 1, kOutputs = 2;
    static int type(size_t) { return kFloat; }
    static bool optional(size_t) { return false; }
    static int output_type(size_t index) { return index == 0 ? kBytes : kFloat; }

    const OrtApi* api;

    OrtStatus* read(const OrtKernelInfo*) {
        return kernel().tiles == nullptr ? failed(api, "molmo_edge QuantizeRows: not on this processor") : nullptr;
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Tensor x;
        MOLMO_TRY(input(api, context, 0, x));
        if (x.shape.empty()) return failed(api, "molmo_edge QuantizeRows: unsupported shape");
        const int64_t rows = rows_of(x), inner = x.shape.back();
        std::vector<int64_t> shape = x.shape;
        shape.back() = 1;
        uint8_t* values = nullptr;
        float* scales = nullptr;
        MOLMO_TRY(output(api, context, 0, {RoundedRows::bytes(rows, inner)}, values));
        MOLMO_TRY(output(api, context, 1, shape, scales));
        Pool pool = {api, context};
        round_rows(kernel(), pool.parallel(), static_cast<const float*>(x.data),
                   {reinterpret_cast<int8_t*>(values), scales, rows, inner});
        return nullptr;
    }
};

// The outputs of QuantizeRows, weights [inner, columns], their scales [columns] and bias [columns], all constant, and a
// residual -> [..., columns]: see EightBitLayer. The bias and the residual are optional. The weights are copied.
struct QuantizedLinear {
    static constexpr const char* kName = "QuantizedLinear";
    static constexpr size_t kInputs = 6, kOutputs = 1;
    static int type(size_t index) { return index == 0 ? kBytes : index == 2 ? kSignedBytes : kFloat; }
    static bool optional(size_t index) { return index >= 4; }
    static int output_type(size_t) { return kFloat; }

    const OrtApi* api;
    int64_t activation = 0;
    std::shared_ptr<const EightBitLayer> layer;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (kernel().tiles == nullptr) return failed(api, "molmo_edge QuantizedLinear: not on this processor");
        MOLMO_TRY((call<kGetInteger>(api, info, "activation", &activation)));
        Tensor weights, scales, bias;
        bool has_bias = false;
        MOLMO_TRY(constant(api, info, 2, weights));
        MOLMO_TRY(constant(api, info, 3, scales));
        MOLMO_TRY(constant(api, info, 4, bias));
        MOLMO_TRY(has_input(api, info, 4, has_bias));
        if (has_bias && bias.data == nullptr)
            return failed(api, "molmo_edge QuantizedLinear: the bias is not constant: make it an initializer, or add it "
                               "with a node Add");
        const bool known = weights.data != nullptr && weights.type == kSignedBytes && weights.shape.size() == 2 &&
                           weights.shape[0] > 0 && weights.shape[1] % (2 * kColumns) == 0 && activation >= 0 &&
                           activation <= 2 && scales.shape == std::vector<int64_t>{weights.shape[1]} &&
                           (bias.data == nullptr || bias.shape == scales.shape);
        if (!known) return failed(api, "molmo_edge QuantizedLinear: unsupported weights");
        layer = std::make_shared<const EightBitLayer>(
            static_cast<const int8_t*>(weights.data), static_cast<const float*>(scales.data),
            static_cast<const float*>(bias.data), weights.shape[0], weights.shape[1]);
        return nullptr;
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Tensor values, scales, residual;
        MOLMO_TRY(input(api, context, 0, values));
        MOLMO_TRY(input(api, context, 1, scales));
        MOLMO_TRY(input(api, context, 5, residual));
        if (scales.shape.empty()) return failed(api, "molmo_edge QuantizedLinear: unsupported inputs");
        const int64_t rows = rows_of(scales);
        std::vector<int64_t> shape = scales.shape;
        shape.back() = layer->columns();
        const bool known = values.shape == std::vector<int64_t>{RoundedRows::bytes(rows, layer->inner())} &&
                           scales.shape.back() == 1 && (residual.data == nullptr || residual.shape == shape);
        if (!known) return failed(api, "molmo_edge QuantizedLinear: unsupported inputs");
        float* out = nullptr;
        MOLMO_TRY(output(api, context, 0, shape, out));
        Pool pool = {api, context};
        layer->multiply(kernel(), pool.parallel(),
                        {static_cast<int8_t*>(values.data), static_cast<float*>(scales.data), rows, layer->inner()},
                        Activation(activation), static_cast<const float*>(residual.data), out);
        return nullptr;
    }
};

}  // namespace molmo::ort
