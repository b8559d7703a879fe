// Every kernel of this processor against the plain one; for processors that QEMU emulates.
//
//     aarch64-linux-gnu-g++ -std=c++17 -O3 -static kernels/src/[!o]*.cpp kernels/tests/equal.cpp -o equal
//     qemu-aarch64 -cpu max equal              # neon-i8mm and neon-dot; cortex-a76: neon-dot; cortex-a72: plain alone
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../src/products.h"

namespace {

const molmo::Parallel kAlone = {
    nullptr, [](void*, int64_t, void (*run)(void*, size_t), void* context) { run(context, 0); }};

struct Random {
    std::mt19937 bits{1};

    std::vector<uint8_t> bytes(int64_t count) {
        std::vector<uint8_t> out(static_cast<size_t>(count));
        for (uint8_t& value : out) value = uint8_t(bits());
        return out;
    }
    std::vector<float> floats(int64_t count) {
        std::normal_distribution<float> normal;
        std::vector<float> out(static_cast<size_t>(count));
        for (float& value : out) value = normal(bits);
        return out;
    }
};

double difference(const std::vector<float>& found, const std::vector<float>& expected) {
    double squared = 0, norm = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        squared += std::pow(double(found[i]) - expected[i], 2);
        norm += std::pow(double(expected[i]), 2);
    }
    return std::sqrt(squared / norm);
}

}  // namespace

int main() {
    int failed = 0;
    std::printf("chosen: %s\n", molmo::kernel().name);
    for (const char* name : {"amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot"}) {
        const molmo::Kernel *kernel = molmo::kernel_named(name), *plain = molmo::kernel_named("plain");
        if (kernel == nullptr) continue;
        double worst = 0;
        for (const int64_t block : {32, 64, 128})
            for (const int64_t rows : {1, 2, 3, 4, 7, 33}) {
                Random random;
                const int64_t inner = 384, columns = 48, blocks = inner / block;
                const auto x = random.floats(rows * inner), scales = random.floats(columns * blocks);
                const auto codes = random.bytes(columns * inner / 2), zeros = random.bytes(columns * (blocks + 1) / 2);
                for (const uint8_t* zero_points : {static_cast<const uint8_t*>(nullptr), zeros.data()}) {
                    const molmo::Matrix matrix = {codes.data(), scales.data(), zero_points, columns, inner, block, false};
                    std::vector<float> found(size_t(rows * columns)), expected(found.size());
                    molmo::multiply(*kernel, kAlone, x.data(), rows, matrix, found.data());
                    molmo::multiply(*plain, kAlone, x.data(), rows, matrix, expected.data());
                    worst = std::max(worst, difference(found, expected));
                }
            }
        std::printf("%-12s relative difference %.1e\n", name, worst);
        failed |= !(worst < 2e-6);
    }
    return failed;
}
