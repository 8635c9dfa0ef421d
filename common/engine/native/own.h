// Working memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

// This thread's own T. On the heap: the compiler would else look a thread-local up at every use.
template <typename T>
T& own() {
    thread_local const std::unique_ptr<T> kept = std::make_unique<T>();
    return *kept;
}

// Room for numbers, from the start of a cache line on, that only grows.
template <typename T>
class Buffer {
  public:
    T* of(int64_t size) {
        const size_t needed = (size_t(size) * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines.size() < needed) lines.resize(needed);
        return reinterpret_cast<T*>(lines.data());
    }
    T* zeros(int64_t size) {
        T* const numbers = of(size);
        std::memset(static_cast<void*>(numbers), 0, size_t(size) * sizeof(T));
        return numbers;
    }

  private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines;
};
