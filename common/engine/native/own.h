// Working memory that a thread keeps from call to call.
#pragma once

#include <memory>

// This thread's own T. On the heap: the compiler would else look a thread-local up at every use.
template <typename T>
T& own() {
    thread_local const std::unique_ptr<T> kept = std::make_unique<T>();
    return *kept;
}
