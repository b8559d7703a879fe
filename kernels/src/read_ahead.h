// Weights that lie in a mapped file and are not in memory are read by page faults, one at a time for each thread. To
// request all that an operator needs before it starts keeps the disk busy: it reads in large pieces, and while the
// first of them are computed.
#pragma once

#include <cstddef>

#include "matrix.h"

namespace molmo {

// Whether pages had to be read from the disk lately. If not, requests would only cost time (3 ms a token for MolmoE).
bool reads_from_disk();

// Request the pages of `size` bytes.
void request(const void* data, size_t size);

inline void request(const Matrix& m) {
    request(m.codes, size_t(m.columns * m.inner / 2));
    request(m.scales, size_t(m.columns * m.blocks()) * (m.half_scales ? 2 : 4));
    if (m.zero_points != nullptr) request(m.zero_points, size_t(m.columns * ((m.blocks() + 1) / 2)));
}

}  // namespace molmo
