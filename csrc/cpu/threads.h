// Work over threads of its own: those of a call end with it.

#pragma once

#include <stdint.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fastgrpo {

// Calls work(next) on up to `threads` threads, the calling one included. next() hands out 0 .. count - 1, each once
// and in this order, then -1.
template <class F>
void share(int64_t count, int64_t threads, F work) {
  std::atomic<int64_t> taken(0);
  const auto next = [&]() -> int64_t {
    const int64_t i = taken.fetch_add(1, std::memory_order_relaxed);
    return i < count ? i : -1;
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < threads && i < count; ++i) {
    try {
      helpers.emplace_back([&] { work(next); });
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run take everything
    }
  }
  work(next);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace fastgrpo
