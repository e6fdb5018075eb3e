// A machine that runs the kernels' threads as fibers, one cluster after another, and finds what a GPU would punish.
//
// Order between threads is kept as vector clocks. A thread's knowledge is a shared, immutable clock (all who left a
// rendezvous together hold the same one) and an epoch of its own, which moves on with everything it publishes.
// Every mbarrier has an entry too: the asynchronous copies that complete on it write in its name, at its phase.
// Shared memory has a shadow cell for every 16 bytes, split into cells of 2 bytes once an access is narrower.

#undef _FORTIFY_SOURCE  // its longjmp takes a switch between fibers for an error

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/elements.h"
#include "cuda_runtime.h"
#include "device.h"

namespace fastgrpo {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxBarriers = 32;  // mbarriers of a block
constexpr int kMaxTransactions = (1 << 20) - 1;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe;

using Clock = std::vector<uint32_t>;
using ClockRef = std::shared_ptr<const Clock>;

enum State : uint8_t { kUnwritten, kWritten, kInFlight, kBarrier };

struct Cell {
  uint32_t write_time = 0;
  uint32_t read_time = 0;  // of several readers: the list of them
  uint16_t writer = kNobody;
  uint16_t reader = kNobody;
  uint16_t sources = 0;  // bulk stores that read here and were not waited for
  State state = kUnwritten;
  int32_t parts = -1;  // of a split cell: the narrow ones
};

struct Read {
  uint16_t reader;
  uint32_t time;
};

struct Range {
  uint32_t at, bytes;
};

struct Wait {
  const char* where;  // a format of a and b
  int a, b;
  bool operator==(const Wait& o) const { return !strcmp(where, o.where) && a == o.a && b == o.b; }
};

struct Thread {
  jmp_buf start, here;
  bool started, exited, awaits_stores;
  int rank, index, actor;  // block in the cluster, thread in the block, entry in the clocks
  Wait wait;
  ClockRef known;
  uint32_t epoch;
  std::vector<uint32_t> fences;  // the epochs that each ended with one
  std::vector<Range> stores;     // sources of bulk stores that were not waited for
  int storing;                   // of these, how many are still to be read
  int value;
};

struct Warp {
  const char* operation;
  std::vector<Thread*> waiting;
};

struct Rendezvous {
  int threads;
  std::vector<Thread*> waiting;
};

struct Barrier {
  uint32_t at;
  int actor;
  int arrivals, pending;
  int64_t transactions = 0;
  uint32_t phase = 0;
  bool remote = false;
  int maker;
  uint32_t made;
  Clock published;                                      // by all who arrived
  ClockRef last;                                        // the clock that was joined into it last
  ClockRef done;                                        // what was published when the last phase completed
  std::vector<std::pair<ClockRef, ClockRef>> acquired;  // clocks of waiters, before and after they saw `done`
  std::vector<Thread*> waiting;
};

struct Block {
  int index, live, in_flight;
  std::vector<char> memory;
  std::vector<Cell> cells;
  std::vector<std::array<Cell, 8>> parts;
  std::vector<int> free_parts;
  std::vector<Warp> warps;
  std::array<Rendezvous, 16> rendezvous;
  std::vector<Barrier> barriers;
};

struct Copy {
  enum { kLoad, kStore, kRemote } kind;
  Thread* thread;
  Block* block;  // whose shared memory it is
  uint32_t at, bytes;
  char* global;
  Barrier* barrier;
  Vec value;
  ClockRef known;
  uint32_t epoch;
};

struct Attributes {
  int shared_bytes = 48 << 10;
  bool wide = false;
};

// The device, and the launch in progress.
struct {
  int devices = 1, major = 9, minor = 0, multiprocessors = 2, active = 2;
  cudaError_t error = cudaSuccess;
  std::map<const void*, Attributes> attributes;
  std::vector<std::pair<uintptr_t, uintptr_t>> allowed;
  uint64_t seed = 0;
  std::string violation;

  void (*body)(void*);
  void* context;
  int grid, cluster, threads;
  uint64_t random;
  std::deque<Thread> fibers;
  std::vector<Block> blocks;
  std::vector<Thread*> ready, round, together;
  std::vector<Copy> copies;
  std::vector<std::vector<Read>> lists;
  std::vector<int> free_lists;
  const char* operation;
  Range range;
  jmp_buf scheduler, abandon;
} m;

Thread* me;  // null while the scheduler runs

Block& my_block() { return m.blocks[me->rank]; }
int stride() { return m.threads + kMaxBarriers; }

uint32_t draw(uint32_t below) {
  uint64_t z = m.random += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (uint32_t)((z ^ z >> 31) >> 32) % below;
}

// ---- violations

std::string text(const char* format, va_list list) {
  char line[512];
  vsnprintf(line, sizeof line, format, list);
  return line;
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::string line = text(format, list);
  va_end(list);
  return line;
}

// Ends the launch. Frames of fibers are dropped as they are: nothing on their stacks may own memory while it matters.
[[noreturn]] __attribute__((format(printf, 2, 3))) void violate(const char* kind, const char* format, ...) {
  va_list list;
  va_start(list, format);
  m.violation = std::string(kind) + ": ";
  if (me) m.violation += text("block %d, thread %d: ", my_block().index, me->index);
  m.violation += text(format, list);
  va_end(list);
  _longjmp(m.abandon, 1);
}

std::string doing() { return text("%s of %u bytes at offset %u", m.operation, m.range.bytes, m.range.at); }

std::string name_of(int actor) {
  const Block& block = m.blocks[actor / stride()];
  const int index = actor % stride();
  if (index < m.threads) return text("thread %d of block %d", index, block.index);
  return text("a copy that completed on the barrier at offset %u", block.barriers[index - m.threads].at);
}

// ---- fibers

__attribute__((noinline)) void run(Thread* thread) {
  me = thread;
  if (!_setjmp(m.scheduler)) {
    if (thread->started) _longjmp(thread->here, 1);
    thread->started = true;
    _longjmp(thread->start, 1);
  }
  me = nullptr;
}

__attribute__((noinline)) void wait_at(const char* where, int a = 0, int b = 0) {
  me->wait = {where, a, b};
  if (!_setjmp(me->here)) _longjmp(m.scheduler, 1);
}

void wake(Thread* thread) { m.ready.push_back(thread); }

void wake_others(const std::vector<Thread*>& threads) {
  for (Thread* thread : threads) {
    if (thread != me) wake(thread);
  }
}

void leave() {
  if (!me->stores.empty()) {
    violate("lost store", "exits without bulk_wait_read after a bulk_store from offset %u", me->stores[0].at);
  }
  me->exited = true;
  Block& block = my_block();
  if (--block.live == 0 && block.in_flight) {
    violate("block gone", "the last thread exits while a copy into the block's shared memory is in flight");
  }
}

// A fiber lives on for later launches, which enter it where `start` was taken.
void fiber() {
  if (_setjmp(me->start)) {
    m.body(m.context);
    leave();
  }
  _longjmp(m.scheduler, 1);
}

void make_fibers(size_t count) {
  if (count <= m.fibers.size()) return;
  const size_t more = count - m.fibers.size();
  char* stacks = (char*)mmap(nullptr, more * kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) violate("machine", "no memory for %zu stacks", more);
  for (size_t i = 0; i < more; i++) {
    m.fibers.emplace_back();
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + i * kStackBytes;
    context.uc_stack.ss_size = kStackBytes - i * 576 % 16384;  // their tops must not all fall into the same cache set
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
    me = &m.fibers.back();
    if (!_setjmp(m.scheduler)) setcontext(&context);
    me = nullptr;
  }
}

// ---- order

bool knows(const Thread* thread, int actor, uint32_t time) {
  return actor == thread->actor || (*thread->known)[actor] >= time;
}

__attribute__((optimize("O3"))) void join(Clock& into, const Clock& from) {
  uint32_t* a = into.data();
  const uint32_t* b = from.data();
  for (size_t i = 0, n = into.size(); i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}

// All of them know what each of them knows.
void meet(const std::vector<Thread*>& threads) {
  std::vector<const Clock*> distinct;
  for (const Thread* thread : threads) {
    if (distinct.empty() || distinct.back() != thread->known.get()) distinct.push_back(thread->known.get());
  }
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  auto clock = std::make_shared<Clock>(*distinct[0]);
  for (size_t i = 1; i < distinct.size(); i++) join(*clock, *distinct[i]);
  for (Thread* thread : threads) (*clock)[thread->actor] = thread->epoch++;
  for (Thread* thread : threads) thread->known = clock;
}

void publish(Barrier& barrier, const ClockRef& known, int actor, uint32_t epoch) {
  if (barrier.last != known) join(barrier.published, *known);
  barrier.last = known;
  barrier.published[actor] = std::max(barrier.published[actor], epoch);
}

void acquire(Barrier& barrier) {
  if (!barrier.done) return;
  for (const auto& seen : barrier.acquired) {
    if (seen.first == me->known) {
      me->known = seen.second;
      return;
    }
  }
  auto clock = std::make_shared<Clock>(*me->known);
  join(*clock, *barrier.done);
  barrier.acquired.emplace_back(me->known, clock);
  me->known = clock;
}

// ---- the shadow of shared memory

int new_list(std::vector<Read> reads) {
  if (m.free_lists.empty()) {
    m.lists.emplace_back();
    m.free_lists.push_back((int)m.lists.size() - 1);
  }
  const int list = m.free_lists.back();
  m.free_lists.pop_back();
  m.lists[list] = std::move(reads);
  return list;
}

void split(Block& block, Cell& cell) {
  if (block.free_parts.empty()) {
    block.parts.emplace_back();
    block.free_parts.push_back((int)block.parts.size() - 1);
  }
  const int parts = block.free_parts.back();
  block.free_parts.pop_back();
  for (int i = 0; i < 8; i++) {
    Cell& part = block.parts[parts][i] = cell;
    if (i && cell.reader == kSeveral) part.read_time = new_list(std::vector<Read>(m.lists[cell.read_time]));
  }
  cell.parts = parts;
}

// Calls visitor(cell, offset) for all cells of a range. Where it leaves cells alike, a split one becomes whole again.
template <class Visitor>
void visit(Block& block, const Range& range, bool alike, Visitor visitor) {
  for (uint32_t at = range.at, end = range.at + range.bytes; at < end;) {
    Cell& cell = block.cells[at / 16];
    const uint32_t stop = std::min(end, at / 16 * 16 + 16);
    if (stop - at == 16 && cell.parts < 0) {
      visitor(cell, at);
    } else {
      if (cell.parts < 0) split(block, cell);
      std::array<Cell, 8>& parts = block.parts[cell.parts];
      for (uint32_t i = at; i < stop; i += 2) visitor(parts[i % 16 / 2], i);
      if (stop - at == 16 && alike) {
        block.free_parts.push_back(cell.parts);
        cell = parts[0];
      }
    }
    at = stop;
  }
}

void record_read(Cell& cell) {
  if (cell.reader == kNobody || (cell.reader != kSeveral && knows(me, cell.reader, cell.read_time))) {
    cell.reader = me->actor;
    cell.read_time = me->epoch;
    return;
  }
  if (cell.reader != kSeveral) {
    cell.read_time = new_list({{cell.reader, cell.read_time}});
    cell.reader = kSeveral;
  }
  std::vector<Read>& list = m.lists[cell.read_time];
  if (list.back().reader == me->actor) {
    list.back().time = me->epoch;
    return;
  }
  list.push_back({(uint16_t)me->actor, me->epoch});
  if (list.size() < (size_t)m.threads * 2 + 2) return;
  // One entry for each reader, its last.
  std::stable_sort(list.begin(), list.end(), [](Read a, Read b) { return a.reader < b.reader; });
  size_t kept = 0;
  for (size_t i = 0; i < list.size(); i++) {
    if (i + 1 == list.size() || list[i + 1].reader != list[i].reader) list[kept++] = list[i];
  }
  list.resize(kept);
}

void forget_readers(Cell& cell) {
  if (cell.reader == kSeveral) m.free_lists.push_back(cell.read_time);
  cell.reader = kNobody;
}

void check_state(const Cell& cell, uint32_t at) {
  if (cell.state == kBarrier) violate("barrier", "%s: offset %u belongs to a barrier", doing().c_str(), at);
  if (cell.state == kInFlight) violate("in flight", "%s: a copy to offset %u is in flight", doing().c_str(), at);
}

void check_writer(const Cell& cell, uint32_t at) {
  if (cell.writer == kNobody || knows(me, cell.writer, cell.write_time)) return;
  violate("race", "%s: offset %u was written by %s, and no synchronisation since", doing().c_str(), at,
          name_of(cell.writer).c_str());
}

void check_read(const Cell& cell, uint32_t at) {
  check_state(cell, at);
  if (cell.state == kUnwritten) violate("unwritten", "%s: nobody wrote offset %u", doing().c_str(), at);
  check_writer(cell, at);
}

void check_write(const Cell& cell, uint32_t at) {
  check_state(cell, at);
  if (cell.sources)
    violate("store source", "%s: a bulk_store reads offset %u, and nobody waited", doing().c_str(), at);
  check_writer(cell, at);
  const auto check_reader = [&](int reader, uint32_t time) {
    if (knows(me, reader, time)) return;
    violate("race", "%s: offset %u was read by %s, and no synchronisation since", doing().c_str(), at,
            name_of(reader).c_str());
  };
  if (cell.reader == kSeveral) {
    for (const Read& read : m.lists[cell.read_time]) check_reader(read.reader, read.time);
  } else if (cell.reader != kNobody) {
    check_reader(cell.reader, cell.read_time);
  }
}

void set_written(Cell& cell, State state, int writer, uint32_t time) {
  forget_readers(cell);
  cell.state = state;
  cell.writer = writer;
  cell.write_time = time;
}

void write_range(Block& block, const Range& range, State state) {
  visit(block, range, true, [&](Cell& cell, uint32_t at) {
    check_write(cell, at);
    set_written(cell, state, me->actor, me->epoch);
  });
}

// What the messages call the operation; its place in a block's shared memory.
void enter(const char* operation, const Block& block, uint32_t at, uint32_t bytes, uint32_t alignment) {
  m.operation = operation;
  m.range = {at, bytes};
  if (at % alignment) violate("misaligned", "%s: not a multiple of %u", doing().c_str(), alignment);
  if ((uint64_t)at + bytes > block.memory.size()) {
    violate("out of bounds", "%s: shared memory has %zu bytes", doing().c_str(), block.memory.size());
  }
}

void check_global(const void* p, uint32_t bytes, uint32_t alignment, const char* operation) {
  const uintptr_t first = (uintptr_t)p, end = first + bytes;
  if (first % alignment) violate("misaligned", "%s of %u bytes at address %p", operation, bytes, p);
  for (const auto& range : m.allowed) {
    if (range.first <= first && end <= range.second) return;
  }
  violate("out of bounds", "%s of %u bytes at address %p: not in what the test allowed", operation, bytes, p);
}

// ---- barriers and copies

// A barrier that this thread may use: made, and known to it.
Barrier& barrier_at(const char* operation, Block& block, uint32_t at) {
  enter(operation, block, at, 8, 8);
  for (Barrier& barrier : block.barriers) {
    if (barrier.at != at) continue;
    if (!knows(me, barrier.maker, barrier.made)) {
      violate("barrier", "%s: no synchronisation since the barrier_init", doing().c_str());
    }
    return barrier;
  }
  violate("barrier", "%s: no barrier_init there", doing().c_str());
}

void advance(Barrier& barrier) {
  if (barrier.pending || barrier.transactions) return;
  barrier.published[barrier.actor] = ++barrier.phase;
  barrier.pending = barrier.arrivals;
  barrier.done = std::make_shared<Clock>(barrier.published);
  barrier.acquired.clear();
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void transact(Barrier& barrier, int64_t bytes) {
  barrier.transactions += bytes;
  if (llabs(barrier.transactions) > kMaxTransactions) {
    violate("barrier", "the barrier at offset %u has %lld bytes to come: past 2^20 - 1", barrier.at,
            (long long)barrier.transactions);
  }
}

void arrive(Barrier& barrier, uint32_t bytes) {
  if (!barrier.pending) {
    violate("barrier", "%s: more than its %d arrivals in a phase", doing().c_str(), barrier.arrivals);
  }
  publish(barrier, me->known, me->actor, me->epoch++);
  barrier.pending--;
  transact(barrier, bytes);
  advance(barrier);
}

void complete(Copy copy) {
  char* shared = copy.block->memory.data() + copy.at;
  if (copy.kind == Copy::kStore) {
    memcpy(copy.global, shared, copy.bytes);
    if (!--copy.thread->storing && copy.thread->awaits_stores) wake(copy.thread);
    return;
  }
  memcpy(shared, copy.kind == Copy::kLoad ? (const void*)copy.global : &copy.value, copy.bytes);
  copy.block->in_flight--;
  Barrier& barrier = *copy.barrier;
  visit(*copy.block, {copy.at, copy.bytes}, true,
        [&](Cell& cell, uint32_t) { set_written(cell, kWritten, barrier.actor, barrier.phase + 1); });
  if (copy.kind == Copy::kRemote) {
    publish(barrier, copy.known, copy.thread->actor, copy.epoch);
    barrier.remote |= copy.thread->rank != barrier.actor / stride();
  }
  transact(barrier, -(int64_t)copy.bytes);
  advance(barrier);
}

void complete_one() {
  const size_t i = m.seed ? draw(m.copies.size()) : 0;
  Copy copy = std::move(m.copies[i]);
  m.copies.erase(m.copies.begin() + i);
  complete(std::move(copy));
}

// When copies complete: at the latest possible moment, one by one; or soon; or at any moment, even the first.
enum { kLate, kSoon, kAny };
int timing() { return m.seed % 3; }

void enqueue(Copy copy) {
  if (copy.kind == Copy::kStore) {
    me->storing++;
  } else {
    copy.block->in_flight++;
  }
  if (m.seed && timing() == kAny && !draw(4)) {
    complete(std::move(copy));
  } else {
    m.copies.push_back(std::move(copy));
  }
}

void check_bulk(const char* operation, uint32_t at, const void* global, uint32_t bytes) {
  enter(operation, my_block(), at, bytes, 16);
  if (!bytes || bytes % 16) violate("misaligned", "%s: the size is not a multiple of 16", doing().c_str());
  check_global(global, bytes, 16, operation);
}

void await(uint32_t at, uint32_t parity, bool cluster) {
  Barrier& barrier = barrier_at(cluster ? "barrier_wait_cluster" : "barrier_wait", my_block(), at);
  if (parity > 1) violate("barrier", "%s: parity %u", doing().c_str(), parity);
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(me);
    wait_at(cluster ? "barrier_wait_cluster(%d, %d)" : "barrier_wait(%d, %d)", at, parity);
  }
  if (barrier.remote && !cluster) {
    violate("barrier", "barrier_wait at offset %u: other blocks store to it, so it takes barrier_wait_cluster", at);
  }
  acquire(barrier);
}

Warp* meet_warp(const char* operation) {
  Warp& warp = my_block().warps[me->index / kLanes];
  if (!warp.waiting.empty() && strcmp(warp.operation, operation)) {
    violate("divergent warp", "%s, while thread %d of the warp is at %s", operation, warp.waiting[0]->index,
            warp.operation);
  }
  warp.operation = operation;
  warp.waiting.push_back(me);
  if (warp.waiting.size() == kLanes) return &warp;
  wait_at(operation);
  return nullptr;
}

template <class Operator>
int reduce_warp(const char* name, int x, Operator combine) {
  me->value = x;
  if (Warp* warp = meet_warp(name)) {
    for (Thread* lane : warp->waiting) x = lane == me ? x : combine(x, lane->value);
    for (Thread* lane : warp->waiting) lane->value = x;
    wake_others(warp->waiting);
    warp->waiting.clear();
  }
  return me->value;
}

// ---- launches

void start_cluster(int first_block) {
  const auto clock = std::make_shared<Clock>((size_t)m.cluster * stride());
  m.ready.clear();
  m.together.clear();
  m.copies.clear();
  m.lists.clear();
  m.free_lists.clear();
  for (int rank = 0; rank < m.cluster; rank++) {
    Block& block = m.blocks[rank];
    block.index = first_block + rank;
    block.live = m.threads;
    block.in_flight = 0;
    std::fill(block.memory.begin(), block.memory.end(), (char)0xff);  // NaN, in every format
    block.cells.assign((block.memory.size() + 15) / 16, Cell());
    block.parts.clear();
    block.free_parts.clear();
    block.warps.assign(m.threads / kLanes, Warp());
    block.rendezvous = {};
    block.barriers.clear();
    block.barriers.reserve(kMaxBarriers);
    for (int i = 0; i < m.threads; i++) {
      Thread& thread = m.fibers[(size_t)rank * m.threads + i];
      thread.started = thread.exited = thread.awaits_stores = false;
      thread.rank = rank;
      thread.index = i;
      thread.actor = rank * stride() + i;
      thread.known = clock;
      thread.epoch = 1;
      thread.fences.clear();
      thread.stores.clear();
      thread.storing = 0;
      thread.wait = {};
      m.ready.push_back(&thread);
    }
  }
}

void report_deadlock() {
  std::string lines;
  for (int rank = 0; rank < m.cluster; rank++) {
    struct Group {
      Wait wait;
      int first, count;
    };
    std::vector<Group> groups;
    for (int i = 0; i < m.threads; i++) {
      const Thread& thread = m.fibers[(size_t)rank * m.threads + i];
      const Wait wait = thread.exited ? Wait{"exited", 0, 0} : thread.wait;
      auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.wait == wait; });
      if (group == groups.end()) group = groups.insert(group, {wait, i, 0});
      group->count++;
    }
    for (const Group& group : groups) {
      lines += text("\n  block %d: %d threads (first %d): ", m.blocks[rank].index, group.count, group.first);
      lines += text(group.wait.where, group.wait.a, group.wait.b);
    }
  }
  m.violation = "deadlock: no thread can go on" + lines;
  _longjmp(m.abandon, 1);
}

void run_cluster(int first_block) {
  start_cluster(first_block);
  for (;;) {
    while (!m.ready.empty()) {
      m.round.swap(m.ready);
      m.ready.clear();
      if (m.seed) {
        for (size_t i = m.round.size(); i > 1; i--) std::swap(m.round[i - 1], m.round[draw(i)]);
      }
      for (Thread* thread : m.round) run(thread);
      while (m.seed && !m.copies.empty() && (timing() == kSoon || (timing() == kAny && draw(2)))) complete_one();
    }
    if (m.copies.empty()) break;
    complete_one();
  }
  for (const Block& block : m.blocks) {
    if (block.live) report_deadlock();
  }
}

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) m.error = error;
  return error;
}

int cluster_of(const cudaLaunchConfig_t* config) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  return cluster;
}

cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t* config) {
  const Attributes& allowed = m.attributes[kernel];
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned cluster = cluster_of(config);
  if (config->dynamicSmemBytes > (size_t)allowed.shared_bytes) return cudaErrorInvalidValue;
  const bool legal = grid.x && grid.x < 1u << 31 && grid.y == 1 && grid.z == 1 && block.x && block.x <= 1024 &&
                     block.x % kLanes == 0 && block.y == 1 && block.z == 1 && cluster && grid.x % cluster == 0 &&
                     cluster <= (allowed.wide ? 16 : 8) && (cluster == 1 || m.major >= 9);
  return legal ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// The bits of the larger number; zero is positive when either is. Equal numbers differ in nothing but a zero's sign.
uint32_t max_bits(float x, float y, uint32_t a, uint32_t b, uint32_t nan) {
  return isnan(x) || isnan(y) ? nan : x > y ? a : x < y ? b : a & b;
}

template <class Element>
uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const Element x = {(uint16_t)(a >> shift)}, y = {(uint16_t)(b >> shift)};
    pair |= max_bits(to_float(x), to_float(y), x.bits, y.bits, 0x7fff) << shift;
  }
  return pair;
}

template <class Element>
uint32_t pack_pair(float low, float high) {
  Element a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | (uint32_t)b.bits << 16;
}

}  // namespace

// ---- device.h

int thread_index() { return me->index; }
int block_index() { return my_block().index; }
int block_count() { return m.grid; }
int cluster_rank() { return me->rank; }
int cluster_size() { return m.cluster; }

const void* shared_read(uint32_t at, uint32_t bytes) {
  Block& block = my_block();
  enter("shared_load", block, at, bytes, bytes);
  visit(block, m.range, false, [&](Cell& cell, uint32_t offset) {
    check_read(cell, offset);
    record_read(cell);
  });
  return block.memory.data() + at;
}

void* shared_write(uint32_t at, uint32_t bytes) {
  Block& block = my_block();
  enter("shared_store", block, at, bytes, bytes);
  write_range(block, m.range, kWritten);
  return block.memory.data() + at;
}

void check_global(const void* p, uint32_t bytes, const char* operation) { check_global(p, bytes, bytes, operation); }

void sync_warp() {
  if (Warp* warp = meet_warp("sync_warp")) {
    meet(warp->waiting);
    wake_others(warp->waiting);
    warp->waiting.clear();
  }
}

// These move a value between the lanes, and order no memory.
int warp_sum(int x) {
  return reduce_warp("warp_sum", x, [](int a, int b) { return (int)((uint32_t)a + (uint32_t)b); });
}

int warp_max(int x) {
  return reduce_warp("warp_max", x, [](int a, int b) { return std::max(a, b); });
}

void sync_threads(int barrier, int threads) {
  if (barrier < 0 || barrier > 15 || threads < kLanes || threads % kLanes || threads > m.threads) {
    violate("sync_threads", "sync_threads(%d, %d) in a block of %d threads", barrier, threads, m.threads);
  }
  Rendezvous& here = my_block().rendezvous[barrier];
  if (!here.waiting.empty() && here.threads != threads) {
    violate("sync_threads", "sync_threads(%d, %d), while thread %d waits there for %d threads", barrier, threads,
            here.waiting[0]->index, here.threads);
  }
  here.threads = threads;
  here.waiting.push_back(me);
  if (here.waiting.size() < (size_t)threads) return wait_at("sync_threads(%d, %d)", barrier, threads);
  std::vector<int> lanes(m.threads / kLanes);
  for (const Thread* thread : here.waiting) lanes[thread->index / kLanes]++;
  for (size_t warp = 0; warp < lanes.size(); warp++) {
    if (lanes[warp] % kLanes) {
      violate("divergent warp", "sync_threads(%d, %d) got %d lanes of warp %zu", barrier, threads, lanes[warp], warp);
    }
  }
  meet(here.waiting);
  wake_others(here.waiting);
  here.waiting.clear();
}

void cluster_sync() {
  m.together.push_back(me);
  if (m.together.size() < (size_t)m.cluster * m.threads) return wait_at("cluster_sync");
  meet(m.together);
  wake_others(m.together);
  m.together.clear();
}

void barrier_init(uint32_t at, int arrivals) {
  Block& block = my_block();
  enter("barrier_init", block, at, 8, 8);
  if (arrivals < 1 || arrivals > kMaxTransactions) {
    violate("barrier", "%s: %d arrivals", doing().c_str(), arrivals);
  }
  if (block.barriers.size() == kMaxBarriers) violate("machine", "more than %d barriers in a block", kMaxBarriers);
  write_range(block, m.range, kBarrier);
  Barrier barrier = {};
  barrier.at = at;
  barrier.actor = me->rank * stride() + m.threads + (int)block.barriers.size();
  barrier.arrivals = barrier.pending = arrivals;
  barrier.maker = me->actor;
  barrier.made = me->epoch;
  barrier.published.resize(me->known->size());
  block.barriers.push_back(std::move(barrier));
}

void barrier_arrive(uint32_t at) { arrive(barrier_at("barrier_arrive", my_block(), at), 0); }
void barrier_expect(uint32_t at, uint32_t bytes) { arrive(barrier_at("barrier_expect", my_block(), at), bytes); }
void barrier_wait(uint32_t at, uint32_t parity) { await(at, parity, false); }
void barrier_wait_cluster(uint32_t at, uint32_t parity) { await(at, parity, true); }

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  Block& block = my_block();
  Barrier& on = barrier_at("bulk_load", block, barrier);
  check_bulk("bulk_load", to, from, bytes);
  write_range(block, m.range, kInFlight);
  enqueue({Copy::kLoad, me, &block, to, bytes, (char*)from, &on, {}, {}, 0});
}

void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  Block& block = my_block();
  check_bulk("bulk_store", from, to, bytes);
  visit(block, m.range, false, [&](Cell& cell, uint32_t at) {
    check_read(cell, at);
    cell.sources++;
    if (cell.writer % stride() >= m.threads) return;  // written by a copy: nothing to fence
    const Thread& writer = m.fibers[cell.writer / stride() * m.threads + cell.writer % stride()];
    const auto fence = std::lower_bound(writer.fences.begin(), writer.fences.end(), cell.write_time);
    if (fence != writer.fences.end() && knows(me, cell.writer, *fence + 1)) return;
    violate("missing fence", "%s: offset %u was written by thread %d, which called no fence_async since",
            doing().c_str(), at, writer.index);
  });
  me->stores.push_back(m.range);
  enqueue({Copy::kStore, me, &block, from, bytes, (char*)to, nullptr, {}, {}, 0});
}

void bulk_wait_read() {
  while (me->storing) {
    me->awaits_stores = true;
    wait_at("bulk_wait_read");
    me->awaits_stores = false;
  }
  for (const Range& range : me->stores) {
    visit(my_block(), range, false, [&](Cell& cell, uint32_t) {
      cell.sources--;
      record_read(cell);
    });
  }
  me->stores.clear();
}

void fence_async() { me->fences.push_back(me->epoch++); }

void remote_store(uint32_t at, uint32_t barrier, int rank, const Vec& v) {
  if (rank < 0 || rank >= m.cluster) violate("out of bounds", "remote_store to rank %d of %d", rank, m.cluster);
  Block& block = m.blocks[rank];
  if (!block.live) violate("block gone", "remote_store to block %d, whose threads have exited", block.index);
  Barrier& on = barrier_at("remote_store", block, barrier);
  enter("remote_store", block, at, 16, 16);
  write_range(block, m.range, kInFlight);
  enqueue({Copy::kRemote, me, &block, at, 16, nullptr, &on, v, me->known, me->epoch++});
}

uint32_t max_bf16x2(uint32_t a, uint32_t b) { return max_pair<BFloat16>(a, b); }
uint32_t max_f16x2(uint32_t a, uint32_t b) { return max_pair<Float16>(a, b); }
float max_f32(float a, float b) { return as_float(max_bits(a, b, as_bits(a), as_bits(b), 0x7fffffff)); }

void unpack_f16x2(uint32_t pair, float& low, float& high) {
  low = to_float(Float16{(uint16_t)pair});
  high = to_float(Float16{(uint16_t)(pair >> 16)});
}

uint32_t pack_bf16x2(float low, float high) { return pack_pair<BFloat16>(low, high); }
uint32_t pack_f16x2(float low, float high) { return pack_pair<Float16>(low, high); }

}  // namespace fastgrpo

// ---- cuda_runtime.h

namespace fastgrpo_host {

using fastgrpo::m;

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  auto& attributes = m.attributes[kernel];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes.wide = value;
  } else if (value < 0 || (size_t)value > fastgrpo::kMaxSharedBytes) {
    return fastgrpo::failed(cudaErrorInvalidValue);
  } else {
    attributes.shared_bytes = value;
  }
  return cudaSuccess;
}

cudaError_t active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  *clusters = m.active;
  return fastgrpo::failed(fastgrpo::check_launch(kernel, config));
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t* config, void (*thread)(void*), void* context) {
  const cudaError_t error = fastgrpo::check_launch(kernel, config);
  if (error != cudaSuccess) return fastgrpo::failed(error);
  m.violation.clear();
  m.body = thread;
  m.context = context;
  m.grid = config->gridDim.x;
  m.cluster = fastgrpo::cluster_of(config);
  m.threads = config->blockDim.x;
  m.random = m.seed;
  m.blocks.resize(m.cluster);
  for (auto& block : m.blocks) block.memory.resize(config->dynamicSmemBytes);
  if (_setjmp(m.abandon)) {
    fastgrpo::me = nullptr;
    return fastgrpo::failed(cudaErrorLaunchFailure);
  }
  fastgrpo::make_fibers((size_t)m.cluster * m.threads);
  for (int block = 0; block < m.grid; block += m.cluster) fastgrpo::run_cluster(block);
  return cudaSuccess;
}

}  // namespace fastgrpo_host

using fastgrpo::m;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = m.devices;
  return fastgrpo::failed(m.devices ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return fastgrpo::failed(m.devices ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
  return fastgrpo::failed(device >= 0 && device < m.devices ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= m.devices) return fastgrpo::failed(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = m.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = m.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = m.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (int)fastgrpo::kMaxSharedBytes;
      return cudaSuccess;
  }
  return fastgrpo::failed(cudaErrorInvalidValue);
}

cudaError_t cudaPeekAtLastError() { return m.error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = m.error;
  m.error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return m.violation.c_str();
  }
  return "unrecognized error code";
}

// ---- what the tests set and ask

extern "C" {

// The order of threads and copies in later launches; 0: in order, with copies as late as can be.
void fastgrpo_host_seed(uint64_t seed) { m.seed = seed; }

// Kernels may touch the global memory that was allowed here, and no other.
void fastgrpo_host_allow(const void* first, int64_t bytes) {
  m.allowed.emplace_back((uintptr_t)first, (uintptr_t)first + bytes);
}
void fastgrpo_host_forget() { m.allowed.clear(); }

// What was wrong in the last launch; empty: nothing.
const char* fastgrpo_host_violation() { return m.violation.c_str(); }

void fastgrpo_host_devices(int count) { m.devices = count; }
void fastgrpo_host_capability(int major, int minor) { m.major = major, m.minor = minor; }
void fastgrpo_host_multiprocessors(int count) { m.multiprocessors = count; }
void fastgrpo_host_active_clusters(int count) { m.active = count; }
}
