// Runs the kernels' threads as fibers, one cluster after another, and what they meet at: warps, barriers, copies.

#undef _FORTIFY_SOURCE  // its longjmp takes a switch between fibers for an error

#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>

namespace fastgrpo_host {

Machine m;
Thread* me;

// ---- violations

static std::string text(const char* format, va_list list) {
  char line[512];
  vsnprintf(line, sizeof line, format, list);
  return line;
}

std::string text(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::string line = text(format, list);
  va_end(list);
  return line;
}

void violate(const char* kind, const char* format, ...) {
  va_list list;
  va_start(list, format);
  m.violation = std::string(kind) + ": ";
  if (me) m.violation += text("block %d, thread %d: ", my_block().index, me->index);
  m.violation += text(format, list);
  va_end(list);
  _longjmp(m.abandon, 1);
}

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxTransactions = (1 << 20) - 1;

uint32_t draw(uint32_t below) {
  uint64_t z = m.random += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (uint32_t)((z ^ z >> 31) >> 32) % below;
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

void leave() {
  if (!me->stores.empty()) {
    violate("lost store", "exits without bulk_wait_read after a bulk_store from offset %u", me->stores[0].at);
  }
  me->wait = {"exited", 0, 0};
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
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + i * kStackBytes;
    context.uc_stack.ss_size = kStackBytes - i * 576 % 16384;  // their tops must not all fall into the same cache set
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
    me = &m.fibers.emplace_back();
    if (!_setjmp(m.scheduler)) setcontext(&context);
    me = nullptr;
  }
}

// ---- threads that meet

// All but this one had to wait.
void release(Threads& waiting) {
  for (Thread* thread : waiting) {
    if (thread != me) m.ready.push_back(thread);
  }
  waiting.clear();
}

// Whether this thread is the last of them. The others wait, until it releases them.
bool last_of(size_t count, Threads& waiting, const char* where, int a = 0, int b = 0) {
  waiting.push_back(me);
  if (waiting.size() == count) return true;
  wait_at(where, a, b);
  return false;
}

bool last_of_warp(const char* operation, Threads& waiting) {
  if (!waiting.empty() && strcmp(waiting[0]->wait.where, operation)) {
    violate("divergent warp", "%s, while thread %d of the warp is at %s", operation, waiting[0]->index,
            waiting[0]->wait.where);
  }
  return last_of(kLanes, waiting, operation);
}

Threads& my_warp() { return my_block().warps[me->index / kLanes]; }

// Moves values between the lanes, and orders no memory.
int reduce_warp(const char* operation, int x, int (*combine)(int, int)) {
  Threads& lanes = my_warp();
  me->value = x;
  if (last_of_warp(operation, lanes)) {
    for (const Thread* lane : lanes) x = lane == me ? x : combine(x, lane->value);
    for (Thread* lane : lanes) lane->value = x;
    release(lanes);
  }
  return me->value;
}

float shuffle(const char* operation, float x, int lane, int argument) {
  if (argument < 0 || argument >= kLanes) violate("lane", "%s: %d of %d lanes", operation, argument, kLanes);
  Threads& lanes = my_warp();
  me->value = (int)fastgrpo::as_bits(x);
  me->source = lane;
  if (last_of_warp(operation, lanes)) {
    int values[kLanes];
    for (const Thread* other : lanes) values[other->index % kLanes] = other->value;
    for (Thread* other : lanes) other->value = values[other->source];
    release(lanes);
  }
  return fastgrpo::as_float((uint32_t)me->value);
}

// ---- barriers

// A barrier that this thread may use: made, and known to it.
Barrier& barrier_at(const char* operation, Block& block, uint32_t at) {
  check_place(operation, block, at, 8);
  for (Barrier& barrier : block.barriers) {
    if (barrier.at != at) continue;
    if (!knows(me, barrier.maker, barrier.made)) {
      violate("barrier", "%s: no synchronisation since the barrier_init", doing().c_str());
    }
    return barrier;
  }
  violate("barrier", "%s: no barrier_init there", doing().c_str());
}

// Adds to what the phase waits for, which completes it when nothing is left.
void transact(Barrier& barrier, int64_t bytes) {
  barrier.transactions += bytes;
  if (llabs(barrier.transactions) > kMaxTransactions) {
    violate("barrier", "the barrier at offset %u has %lld bytes to come: past 2^20 - 1", barrier.at,
            (long long)barrier.transactions);
  }
  if (barrier.pending || barrier.transactions) return;
  barrier.published[barrier.actor] = ++barrier.phase;
  barrier.pending = barrier.arrivals;
  barrier.done = std::make_shared<Clock>(barrier.published);
  barrier.acquired.clear();
  release(barrier.waiting);
}

void arrive(const char* operation, uint32_t at, uint32_t bytes) {
  Barrier& barrier = barrier_at(operation, my_block(), at);
  if (!barrier.pending) {
    violate("barrier", "%s: more than its %d arrivals in a phase", doing().c_str(), barrier.arrivals);
  }
  publish(barrier, me->known, me->actor, me->epoch++);
  barrier.pending--;
  transact(barrier, bytes);
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

// ---- copies

void complete(const Copy& copy) {
  char* shared = copy.block->memory.data() + copy.range.at;
  if (copy.kind == Copy::kStore) {
    memcpy(copy.global, shared, copy.range.bytes);
    if (!--copy.thread->storing && copy.thread->awaits_stores) m.ready.push_back(copy.thread);
    return;
  }
  memcpy(shared, copy.kind == Copy::kLoad ? (const void*)copy.global : &copy.value, copy.range.bytes);
  copy.block->in_flight--;
  Barrier& barrier = *copy.barrier;
  finish_copy(*copy.block, copy.range, barrier);
  if (copy.kind == Copy::kLoad) end_load(copy.global, copy.range.bytes, barrier);
  if (copy.kind == Copy::kRemote) {
    publish(barrier, copy.known, copy.thread->actor, copy.epoch);
    barrier.remote |= copy.block != &m.blocks[copy.thread->rank];
  }
  transact(barrier, -(int64_t)copy.range.bytes);
}

void complete_one() {
  const size_t i = m.seed ? draw(m.copies.size()) : 0;
  const Copy copy = std::move(m.copies[i]);
  m.copies.erase(m.copies.begin() + i);
  complete(copy);
}

// When copies complete: at the latest possible moment, one by one; or soon; or at any moment, even the first.
enum { kLate, kSoon, kAny };
int timing() { return m.seed % 3; }

void begin(Copy copy) {
  if (copy.kind == Copy::kStore) {
    me->storing++;
  } else {
    copy.block->in_flight++;
  }
  if (timing() == kAny && !draw(4)) {
    complete(copy);
  } else {
    m.copies.push_back(std::move(copy));
  }
}

constexpr uint64_t kPolicy = 0x12f0000000000000;  // and 0 or 1

void check_bulk(const char* operation, uint32_t shared, const void* global, uint32_t bytes, uint64_t policy) {
  fastgrpo::check_policy(operation, policy);
  ((shared - (uintptr_t)global) % 128 == 0 ? m.bulk_copies.in_phase : m.bulk_copies.out_of_phase)++;
  m.bulk_copies.evict_first += policy & 1;
  if (!bytes || bytes % 16) violate("misaligned", "%s of %u bytes: not a multiple of 16", operation, bytes);
  check_global(operation, global, bytes);
}

// ---- launches

void start_cluster(int first_block, size_t shared_bytes) {
  const auto clock = std::make_shared<Clock>((size_t)m.cluster * stride());
  m.ready.clear();
  m.cluster_waiting.clear();
  m.copies.clear();
  m.lists = {};
  m.pages.clear();
  for (int rank = 0; rank < m.cluster; rank++) {
    Block& block = m.blocks[rank] = Block();
    block.index = first_block + rank;
    block.live = m.threads;
    block.memory.assign(shared_bytes, (char)0xff);  // NaN, in every format
    block.shadow.cells.resize((shared_bytes + 15) / 16);
    block.warps.resize(m.threads / kLanes);
    block.barriers.reserve(kMaxBarriers);  // copies point to them
    for (int i = 0; i < m.threads; i++) {
      Thread& thread = m.fibers[(size_t)rank * m.threads + i];
      thread.started = thread.awaits_stores = false;
      thread.rank = rank;
      thread.index = i;
      thread.actor = rank * stride() + i;
      thread.wait = {};
      thread.known = clock;
      thread.epoch = 1;
      thread.fences.clear();
      thread.stores.clear();
      thread.storing = 0;
      m.ready.push_back(&thread);
    }
  }
}

[[noreturn]] void report_deadlock() {
  m.violation = "deadlock: no thread can go on";
  for (int rank = 0; rank < m.cluster; rank++) {
    struct Group {
      std::string where;
      int first, count;
    };
    std::vector<Group> groups;
    for (int i = 0; i < m.threads; i++) {
      const Wait& wait = m.fibers[(size_t)rank * m.threads + i].wait;
      const std::string where = text(wait.where, wait.a, wait.b);
      auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.where == where; });
      if (group == groups.end()) group = groups.insert(group, {where, i, 0});
      group->count++;
    }
    for (const Group& group : groups) {
      m.violation += text("\n  block %d: %d threads (first %d): %s", m.blocks[rank].index, group.count, group.first,
                          group.where.c_str());
    }
  }
  _longjmp(m.abandon, 1);
}

void run_cluster() {
  for (;;) {
    while (!m.ready.empty()) {
      m.round.swap(m.ready);
      m.ready.clear();
      if (m.seed) {
        for (size_t i = m.round.size(); i > 1; i--) std::swap(m.round[i - 1], m.round[draw(i)]);
      }
      for (Thread* thread : m.round) run(thread);
      while (!m.copies.empty() && (timing() == kSoon || (timing() == kAny && draw(2)))) complete_one();
    }
    if (m.copies.empty()) break;
    complete_one();
  }
  for (const Block& block : m.blocks) {
    if (block.live) report_deadlock();
  }
}

}  // namespace

bool run_grid(void (*body)(void*), void* context, int grid, int cluster, int threads, size_t shared_bytes) {
  m.violation.clear();
  m.body = body;
  m.context = context;
  m.grid = grid;
  m.cluster = cluster;
  m.threads = threads;
  m.random = m.seed;
  m.bulk_copies = {};
  m.blocks.resize(cluster);
  if (_setjmp(m.abandon)) {
    me = nullptr;
    return false;
  }
  make_fibers((size_t)cluster * threads);
  for (int block = 0; block < grid; block += cluster) {
    start_cluster(block, shared_bytes);
    run_cluster();
  }
  return true;
}

}  // namespace fastgrpo_host

// ---- device.h

namespace fastgrpo {

using namespace fastgrpo_host;

int thread_index() { return me->index; }
int block_index() { return my_block().index; }
int block_count() { return m.grid; }
int cluster_rank() { return me->rank; }
int cluster_size() { return m.cluster; }

void sync_warp() {
  Threads& lanes = my_warp();
  if (!last_of_warp("sync_warp", lanes)) return;
  meet(lanes);
  release(lanes);
}

int warp_sum(int x) {
  return reduce_warp("warp_sum", x, [](int a, int b) { return (int)((uint32_t)a + (uint32_t)b); });
}

int warp_max(int x) {
  return reduce_warp("warp_max", x, [](int a, int b) { return std::max(a, b); });
}

float warp_from(float x, int lane) { return shuffle("warp_from", x, lane, lane); }
float warp_across(float x, int mask) { return shuffle("warp_across", x, me->index % kLanes ^ mask, mask); }

void sync_threads(int barrier, int threads) {
  if (barrier < 0 || barrier > 15 || threads < kLanes || threads % kLanes || threads > m.threads) {
    violate("sync_threads", "sync_threads(%d, %d) in a block of %d threads", barrier, threads, m.threads);
  }
  Threads& waiting = my_block().rendezvous[barrier];
  if (!waiting.empty() && waiting[0]->wait.b != threads) {
    violate("sync_threads", "sync_threads(%d, %d), while thread %d waits there for %d threads", barrier, threads,
            waiting[0]->index, waiting[0]->wait.b);
  }
  if (!last_of(threads, waiting, "sync_threads(%d, %d)", barrier, threads)) return;
  std::vector<int> lanes(m.threads / kLanes);
  for (const Thread* thread : waiting) lanes[thread->index / kLanes]++;
  for (size_t warp = 0; warp < lanes.size(); warp++) {
    if (lanes[warp] % kLanes) {
      violate("divergent warp", "sync_threads(%d, %d) got %d lanes of warp %zu", barrier, threads, lanes[warp], warp);
    }
  }
  meet(waiting);
  release(waiting);
}

void cluster_sync() {
  if (!last_of((size_t)m.cluster * m.threads, m.cluster_waiting, "cluster_sync")) return;
  meet(m.cluster_waiting);
  release(m.cluster_waiting);
}

void barrier_init(uint32_t at, int arrivals) {
  Block& block = my_block();
  write("barrier_init", block, {at, 8}, kBarrier);
  if (arrivals < 1 || arrivals > kMaxTransactions) violate("barrier", "%s: %d arrivals", doing().c_str(), arrivals);
  if (block.barriers.size() == kMaxBarriers) violate("machine", "more than %d barriers in a block", kMaxBarriers);
  const int actor = me->rank * stride() + m.threads + (int)block.barriers.size();
  block.barriers.push_back({at, actor, arrivals, arrivals, me->actor, me->epoch, Clock(me->known->size())});
}

void barrier_arrive(uint32_t at) { arrive("barrier_arrive", at, 0); }
void barrier_expect(uint32_t at, uint32_t bytes) { arrive("barrier_expect", at, bytes); }
void barrier_wait(uint32_t at, uint32_t parity) { await(at, parity, false); }
void barrier_wait_cluster(uint32_t at, uint32_t parity) { await(at, parity, true); }

uint64_t cache_policy(bool evict_first) { return kPolicy | evict_first; }

void check_policy(const char* operation, uint64_t policy) {
  if ((policy | 1) != (kPolicy | 1)) violate("policy", "%s: %#llx", operation, (unsigned long long)policy);
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
  Block& block = my_block();
  Barrier& on = barrier_at("bulk_load", block, barrier);
  check_bulk("bulk_load", to, from, bytes, policy);
  begin_load(from, bytes);
  write("bulk_load", block, {to, bytes}, kInFlight, true);
  begin({Copy::kLoad, me, &block, {to, bytes}, (char*)from, &on});
}

void bulk_store(void* to, uint32_t from, uint32_t bytes, uint64_t policy) {
  check_bulk("bulk_store", from, to, bytes, policy);
  begin_store({from, bytes});
  write_global("bulk_store", to, bytes, kInFlight);
  me->stores.push_back({from, bytes});
  begin({Copy::kStore, me, &my_block(), {from, bytes}, (char*)to});
}

void bulk_wait_read() {
  if (me->storing) {
    me->awaits_stores = true;
    wait_at("bulk_wait_read");
    me->awaits_stores = false;
  }
  for (const Range& range : me->stores) end_store(range);
  me->stores.clear();
}

void fence_async() { me->fences.push_back(me->epoch++); }

void remote_store(uint32_t at, uint32_t barrier, int rank, const Vec& v) {
  if (rank < 0 || rank >= m.cluster) violate("out of bounds", "remote_store to rank %d of %d", rank, m.cluster);
  Block& block = m.blocks[rank];
  if (!block.live) violate("block gone", "remote_store to block %d, whose threads have exited", block.index);
  Barrier& on = barrier_at("remote_store", block, barrier);
  write("remote_store", block, {at, 16}, kInFlight);
  begin({Copy::kRemote, me, &block, {at, 16}, nullptr, &on, v, me->known, me->epoch++});
}

}  // namespace fastgrpo
