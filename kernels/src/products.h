// Products of many rows, on several threads.
#pragma once

#include "matrix.h"
#include "parallel.h"

namespace molmo {

// x [count, inner] -> out [count, columns]
void multiply(const Kernel& kernel, const Parallel& parallel, const float* x, int64_t count, const Matrix& matrix,
              float* out);

// The feed-forward layer of a mixture of experts: gate and up alternate in the columns of `first`.
struct Experts {
    Matrix first;   // of expert 0; the others follow it
    Matrix second;
    int64_t count;  // experts
    int64_t chosen;  // of each row
};

// x [rows, inner], probabilities [rows, experts] that choose, weights [rows, experts] -> out [rows, inner]:
// the sum of the chosen experts' outputs, each times its weight.
void experts(const Kernel& kernel, const Parallel& parallel, const float* x, int64_t rows, const float* probabilities,
             const float* weights, const Experts& layer, float* out);

}  // namespace molmo
