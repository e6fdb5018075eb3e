// What the machine's parts share: its state, and what they call of each other. device.h is what kernels call.
//
// Order between threads is kept as vector clocks. A thread's knowledge is a shared, immutable clock (all who left a
// rendezvous together hold the same one) and an epoch of its own, which moves on with everything it publishes.
// Every mbarrier has an entry too: the asynchronous copies that complete on it write in its name, at its phase.
// Shared memory has a shadow cell for every 16 bytes, split into cells of 2 bytes once an access is narrower, and so
// has the global memory that a cluster touches. A bulk load reads global memory in its barrier's name; what a bulk
// store writes there stays in flight until the cluster has ended.

#pragma once

#include <setjmp.h>

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.h"

namespace fastgrpo_host {

constexpr int kLanes = 32;
constexpr int kMaxBarriers = 32;  // mbarriers of a block
constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe;

using Clock = std::vector<uint32_t>;
using ClockRef = std::shared_ptr<const Clock>;

struct Range {
  uint32_t at, bytes;
};

// Things to take and to give back, by number.
template <class T>
struct Pool {
  std::vector<T> all;
  std::vector<int> free;

  T& operator[](int i) { return all[i]; }
  void give(int i) { free.push_back(i); }
  int take() {
    if (free.empty()) {
      all.emplace_back();
      return (int)all.size() - 1;
    }
    const int i = free.back();
    free.pop_back();
    return i;
  }
};

enum State : uint8_t { kUnwritten, kWritten, kInFlight, kBarrier };

struct Cell {
  uint32_t write_time = 0;
  uint32_t read_time = 0;  // of several readers: the list of them
  uint16_t writer = kNobody;
  uint16_t reader = kNobody;
  uint16_t sources = 0;  // bulk copies that read here and were not waited for
  State state = kUnwritten;
  int32_t parts = -1;  // of a split cell: the narrow ones
};

struct Read {
  uint16_t reader;
  uint32_t time;
};

struct Wait {
  const char* where;  // a format of a and b
  int a, b;
};

struct Thread {
  jmp_buf start, here;
  bool started, awaits_stores;
  int rank, index, actor;  // block in the cluster, thread in the block, entry in the clocks
  Wait wait;
  ClockRef known;
  uint32_t epoch;
  std::vector<uint32_t> fences;  // the epochs that each ended with one
  std::vector<Range> stores;     // sources of bulk stores that were not waited for
  int storing;                   // of these, how many are still to be read
  int value, source;             // what it gives to its warp, and the lane whose it takes
};

using Threads = std::vector<Thread*>;

struct Barrier {
  uint32_t at;
  int actor;
  int arrivals, pending;
  int maker;
  uint32_t made;
  Clock published;  // by all who arrived
  int64_t transactions = 0;
  uint32_t phase = 0;
  bool remote = false;                                       // other blocks store to it
  ClockRef last = nullptr;                                   // the clock that was joined into `published` last
  ClockRef done = nullptr;                                   // what was published when the last phase completed
  std::vector<std::pair<ClockRef, ClockRef>> acquired = {};  // clocks of waiters, before and after they saw `done`
  Threads waiting = {};
};

struct Shadow {
  std::vector<Cell> cells;
  Pool<std::array<Cell, 8>> parts = {};
};

constexpr uintptr_t kPage = 4096;  // bytes of global memory with a shadow of their own

struct Block {
  int index, live;
  int in_flight = 0;  // copies into its shared memory
  std::vector<char> memory;
  Shadow shadow;
  std::vector<Threads> warps;               // who waits for the rest of its warp
  std::array<Threads, 16> rendezvous = {};  // and at sync_threads
  std::vector<Barrier> barriers = {};
};

struct Copy {
  enum { kLoad, kStore, kRemote } kind;
  Thread* thread;
  Block* block;  // whose shared memory it is
  Range range;
  char* global;
  Barrier* barrier = nullptr;
  fastgrpo::Vec value = {};  // and what its sender knew, as a remote store arrives in its sender's name
  ClockRef known = nullptr;
  uint32_t epoch = 0;
};

struct Machine {
  std::vector<std::pair<uintptr_t, uintptr_t>> allowed;  // global memory that kernels may touch
  uint64_t seed = 0;
  std::string violation;

  // The launch in progress.
  void (*body)(void*);
  void* context;
  int grid, cluster, threads;
  uint64_t random;
  std::deque<Thread> fibers;  // of the cluster in progress; those past its threads are left of larger ones
  std::vector<Block> blocks;
  Threads ready, round, cluster_waiting;
  std::vector<Copy> copies;
  Pool<std::vector<Read>> lists;
  std::unordered_map<uintptr_t, Shadow> pages;  // of global memory
  struct {
    int64_t in_phase, out_of_phase;  // modulo 128 bytes
    int64_t evict_first;
  } bulk_copies;  // of this launch
  const char* operation;
  Range range;  // of the access, and its address in global memory; null: it is to shared memory
  const void* address;
  jmp_buf scheduler, abandon;
};

extern Machine m;
extern Thread* me;  // null while the scheduler runs

inline Block& my_block() { return m.blocks[me->rank]; }
inline int stride() { return m.threads + kMaxBarriers; }  // from a block's actors to the next one's

// ---- machine.cpp

// Runs a kernel's threads. False: m.violation says what was wrong.
bool run_grid(void (*body)(void*), void* context, int grid, int cluster, int threads, size_t shared_bytes);

// Ends the launch. Frames of fibers are dropped as they are: nothing on their stacks may own memory while it matters.
[[noreturn, gnu::format(printf, 2, 3)]] void violate(const char* kind, const char* format, ...);
[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...);

// ---- memory.cpp

inline bool knows(const Thread* thread, int actor, uint32_t time) {
  return actor == thread->actor || (*thread->known)[actor] >= time;
}
void meet(const Threads& threads);
void publish(Barrier& barrier, const ClockRef& known, int actor, uint32_t epoch);
void acquire(Barrier& barrier);

// The access that check_place took note of, for messages.
std::string doing();
void check_place(const char* operation, const Block& block, uint32_t at, uint32_t bytes);
void write(const char* operation, Block& block, const Range& range, State state, bool bulk = false);
void finish_copy(Block& block, const Range& range, const Barrier& barrier);
void begin_store(const Range& range);
void end_store(const Range& range);
// The same of a bulk load, and of what it reads.
void begin_load(const void* from, uint32_t bytes);
void end_load(const void* from, uint32_t bytes, const Barrier& barrier);
void write_global(const char* operation, const void* p, uint32_t bytes, State state);
void check_global(const char* operation, const void* p, uint32_t bytes);

}  // namespace fastgrpo_host
