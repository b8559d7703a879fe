// The attention of decoders. molmo_edge.runtimes.kernels moves a node to this operator if it is of this kind.
#pragma once

#include "cached_attention.h"
#include "operator.h"

namespace molmo::ort {

// com.microsoft's GroupQueryAttention of one sequence in float32, with rotary tables in halves. It is causal, or with an
// attention_bias [1, 1, n, total] it is not.
struct GroupQueryAttention {
    static constexpr const char* kName = "GroupQueryAttention";
    static constexpr size_t kInputs = 11, kOutputs = 3;
    enum : size_t { kQ, kK, kV, kPastKeys, kPastValues, kLast, kTotal, kCos, kSin, kPositionIds, kBias };
    static int type(size_t index) { return index == kLast || index == kTotal ? kInt32 : index == kPositionIds ? kInt64 : kFloat; }
    static bool optional(size_t index) { return index >= kPositionIds; }
    static int output_type(size_t) { return kFloat; }

    const OrtApi* api;
    int64_t heads = 0, kv_heads = 0;
    float scale = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (kernel().tiles == nullptr || kernel().tiles->bfloat16 == nullptr)
            return failed(api, "molmo_edge GroupQueryAttention: not on this processor");
        MOLMO_TRY((call<kGetInteger>(api, info, "num_heads", &heads)));
        MOLMO_TRY((call<kGetInteger>(api, info, "kv_num_heads", &kv_heads)));
        MOLMO_TRY((call<kGetFloat>(api, info, "scale", &scale)));
        return heads > 0 && kv_heads > 0 && heads % kv_heads == 0
                   ? nullptr
                   : failed(api, "molmo_edge GroupQueryAttention: unsupported numbers of heads");
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Tensor given[kInputs];
        for (size_t i = 0; i < kInputs; ++i) MOLMO_TRY(input(api, context, i, given[i]));
        const auto& q = given[kQ].shape;
        const auto& past = given[kPastKeys].shape;
        const auto& cos = given[kCos].shape;
        const std::vector<int64_t> one = {1};
        if (q.size() != 3 || past.size() != 4 || cos.size() != 2 || given[kTotal].shape != one || given[kLast].shape != one)
            return failed(api, "molmo_edge GroupQueryAttention: unsupported shapes");
        const int64_t last = *static_cast<int32_t*>(given[kLast].data), total = *static_cast<int32_t*>(given[kTotal].data);
        const int64_t rows = q[1], capacity = past[2], width = past[3];
        const std::vector<int64_t> new_keys = {1, rows, kv_heads * width}, bias = {1, 1, rows, total};
        const bool known =
            width > 0 && width % 16 == 0 && q == std::vector<int64_t>{1, rows, heads * width} &&
            given[kK].shape == new_keys && given[kV].shape == new_keys && total >= rows && total <= capacity &&
            last == total - 1 &&
            past == std::vector<int64_t>{1, kv_heads, capacity, width} && given[kPastValues].shape == past &&
            given[kSin].shape == cos && cos[0] >= total && cos[1] == width / 2 && given[kPositionIds].data == nullptr &&
            (given[kBias].data == nullptr || given[kBias].shape == bias);
        if (!known) return failed(api, "molmo_edge GroupQueryAttention: unsupported shapes");
        float *out = nullptr, *cache[2] = {};
        MOLMO_TRY(output(api, context, 0, q, out));
        for (size_t part = 0; part < 2; ++part) {
            MOLMO_TRY(output(api, context, 1 + part, past, cache[part]));
            copy_past(static_cast<const float*>(given[kPastKeys + part].data), cache[part], capacity * width,
                      (total - rows) * width);
        }
        if (rows == 0) return nullptr;
        Pool pool = {api, context};
        const auto data = [&given](size_t index) { return static_cast<const float*>(given[index].data); };
        cached_attention(kernel(), pool.parallel(),
                         {data(kQ), data(kK), data(kV), cache[0], cache[1], data(kCos), data(kSin), data(kBias), rows,
                          total - rows, capacity, heads, kv_heads, width, scale},
                         out);
        return nullptr;
    }

    // The shape of q, whose last dimension may not be known, while that of the cache is.
    static OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeContext* context) {
        constexpr int kIntegerAttribute = 1;
        const OrtApi* api = static_cast<const Registered<GroupQueryAttention>*>(op)->api;
        const OrtOpAttr* attribute = nullptr;
        OrtShape *q = nullptr, *cache = nullptr;
        std::vector<int64_t> sizes, past;
        int64_t heads = 0;
        size_t read = 0;
        const OrtShapeContext* own = context;
        MOLMO_TRY(input_shape(api, own, kQ, q, sizes));
        MOLMO_TRY(input_shape(api, own, kPastKeys, cache, past));
        MOLMO_TRY((call<kGetAttribute>(api, own, "num_heads", &attribute)));
        MOLMO_TRY((call<kReadAttribute>(api, attribute, kIntegerAttribute, static_cast<void*>(&heads), sizeof heads, &read)));
        if (sizes.size() != 3 || past.size() != 4 || past[3] < 0) return nullptr;
        sizes[2] = heads * past[3];
        const int64_t* all = sizes.data();
        MOLMO_TRY((call<kSetDimensions>(api, q, all, sizes.size())));
        return set_output_shape(api, own, q, sizes);
    }

    // Nothing to do if the caller bound one buffer to both, as molmo_edge does. Positions from `total` on stay undefined.
    void copy_past(const float* from, float* to, int64_t stride, int64_t filled) const {
        if (from == to) return;
        for (int64_t head = 0; head < kv_heads; ++head)
            std::memcpy(to + head * stride, from + head * stride, size_t(filled) * sizeof(float));
    }
};

}  // namespace molmo::ort
