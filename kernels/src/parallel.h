// Work of several threads, and memory of one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>

namespace molmo {

// Calls run(context, task) for every task in 0..count - 1, on any threads, and returns when all have ended.
struct Parallel {
    void* threads;
    void (*each)(void* threads, int64_t count, void (*run)(void* context, size_t task), void* context);
};

// run(task) for every task in 0..count - 1. Whichever thread is free takes the next one: experts differ in their rows,
// and cores in their speed. Throws the first exception of a task here, not on a thread of ONNX Runtime, which would end
// the process; tasks that have not started are left out.
template <typename Run>
void each(const Parallel& parallel, int64_t count, const Run& run) {
    if (count <= 1) {
        if (count == 1) run(int64_t{0});
        return;
    }
    struct Shared {
        const Run* run;
        std::atomic<int64_t> next;
        int64_t count;
        std::atomic<bool> failed;
        std::exception_ptr error;
    } shared{&run, {0}, count, {false}, nullptr};
    parallel.each(parallel.threads, count, [](void* context, size_t) {
        Shared& s = *static_cast<Shared*>(context);
        try {
            for (int64_t task; (task = s.next.fetch_add(1)) < s.count;) (*s.run)(task);
        } catch (...) {
            if (!s.failed.exchange(true)) s.error = std::current_exception();
            s.next = s.count;
        }
    }, &shared);
    if (shared.error) std::rethrow_exception(shared.error);
}

// Memory whose start is aligned and whose content is not initialized.
template <typename T>
class Buffer {
public:
    explicit Buffer(int64_t size) { grow(size); }
    Buffer() = default;
    T* grow(int64_t size) {
        if (size > size_) {
            memory_.reset(new uint8_t[size_t(size) * sizeof(T) + 64]);
            size_ = size;
        }
        return data();
    }
    T* data() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63)); }

private:
    std::unique_ptr<uint8_t[]> memory_;
    int64_t size_ = 0;
};

inline int64_t up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

}  // namespace molmo
