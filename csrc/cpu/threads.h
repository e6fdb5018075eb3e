// Work over threads of its own: those of a call end with it.

#pragma once

#include <stdint.h>

#include <atomic>
#include <exception>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace fastgrpo {

// Calls work(next) on up to `threads` threads, the calling one included. next() hands out 0 .. count - 1, each once
// and in this order, then -1.
//
// What work throws on one of the threads is thrown here, once all have ended; the others get no more of the count.
// Where one part of the work waits for another, a thread has to have all of its memory before its first next(): nobody
// does the part of one that threw.
template <class F>
void share(int64_t count, int64_t threads, F work) {
  std::atomic<int64_t> taken(0);
  const auto next = [&]() -> int64_t {
    const int64_t i = taken.fetch_add(1, std::memory_order_relaxed);
    return i < count ? i : -1;
  };
  std::atomic<bool> failed(false);
  std::exception_ptr failure;
  const auto run = [&] {
    try {
      work(next);
    } catch (...) {
      taken.store(count, std::memory_order_relaxed);
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads && i < count; ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads to be had: those that run take everything
  } catch (const std::bad_alloc&) {     // nor memory for one
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastgrpo
