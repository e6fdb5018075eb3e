// Who knows of what, who touched which bytes of shared memory, and what a thread may touch.

#include <algorithm>

#include "machine.h"

namespace fastgrpo_host {

// ---- order

// -O2 would leave the loop scalar, and a clock has thousands of entries.
__attribute__((optimize("O3"))) static void join(Clock& into, const Clock& from) {
  uint32_t* a = into.data();
  const uint32_t* b = from.data();
  for (size_t i = 0, n = into.size(); i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}

// All of them know what each of them knows.
void meet(const Threads& threads) {
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

// ---- shadow cells

namespace {

void split(Block& block, Cell& cell) {
  const int parts = block.parts.take();
  for (int i = 0; i < 8; i++) {
    Cell& part = block.parts[parts][i] = cell;
    if (i && cell.reader == kSeveral) {
      part.read_time = m.lists.take();
      m.lists[part.read_time] = m.lists[cell.read_time];
    }
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
        block.parts.give(cell.parts);
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
    const int list = m.lists.take();
    m.lists[list] = {{cell.reader, cell.read_time}};
    cell.read_time = list;
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
  std::vector<uint32_t> last(me->known->size());  // 0: none, as epochs begin at 1
  for (const Read& read : list) last[read.reader] = read.time;
  list.clear();
  for (size_t reader = 0; reader < last.size(); reader++) {
    if (last[reader]) list.push_back({(uint16_t)reader, last[reader]});
  }
}

void record_write(Cell& cell, State state, int writer, uint32_t time) {
  if (cell.reader == kSeveral) m.lists.give(cell.read_time);
  cell.reader = kNobody;
  cell.state = state;
  cell.writer = writer;
  cell.write_time = time;
}

// ---- checks of shared memory

std::string name_of(int actor) {
  const Block& block = m.blocks[actor / stride()];
  const int index = actor % stride();
  if (index < m.threads) return text("thread %d of block %d", index, block.index);
  return text("a copy that completed on the barrier at offset %u", block.barriers[index - m.threads].at);
}

void check_order(const char* what, int actor, uint32_t time, uint32_t at) {
  if (actor == kNobody || knows(me, actor, time)) return;
  violate("race", "%s: offset %u was %s by %s, and no synchronisation since", doing().c_str(), at, what,
          name_of(actor).c_str());
}

void check_state(const Cell& cell, uint32_t at) {
  if (cell.state == kBarrier) violate("barrier", "%s: offset %u belongs to a barrier", doing().c_str(), at);
  if (cell.state == kInFlight) violate("in flight", "%s: a copy to offset %u is in flight", doing().c_str(), at);
}

void check_read(const Cell& cell, uint32_t at) {
  check_state(cell, at);
  if (cell.state == kUnwritten) violate("unwritten", "%s: nobody wrote offset %u", doing().c_str(), at);
  check_order("written", cell.writer, cell.write_time, at);
}

void check_write(const Cell& cell, uint32_t at) {
  check_state(cell, at);
  if (cell.sources) {
    violate("store source", "%s: a bulk_store reads offset %u, and nobody waited", doing().c_str(), at);
  }
  check_order("written", cell.writer, cell.write_time, at);
  if (cell.reader == kSeveral) {
    for (const Read& read : m.lists[cell.read_time]) check_order("read", read.reader, read.time, at);
  } else {
    check_order("read", cell.reader, cell.read_time, at);
  }
}

// Bulk copies are in order with what a thread wrote only after the writer's fence, which must be known here by now.
void check_fenced(const Cell& cell, uint32_t at) {
  if (cell.writer == kNobody) return;
  const int index = cell.writer % stride();
  if (index >= m.threads) return;  // written by a copy: nothing to fence
  const Thread& writer = m.fibers[cell.writer / stride() * m.threads + index];
  const auto fence = std::lower_bound(writer.fences.begin(), writer.fences.end(), cell.write_time);
  if (fence != writer.fences.end() && knows(me, cell.writer, *fence + 1)) return;
  violate("missing fence", "%s: offset %u was written by thread %d, which called no fence_async since",
          doing().c_str(), at, index);
}

}  // namespace

std::string doing() { return text("%s of %u bytes at offset %u", m.operation, m.range.bytes, m.range.at); }

void check_place(const char* operation, const Block& block, uint32_t at, uint32_t bytes) {
  m.operation = operation;
  m.range = {at, bytes};
  const uint32_t alignment = std::min(bytes, 16u);
  if (at % alignment) violate("misaligned", "%s: not a multiple of %u", doing().c_str(), alignment);
  if ((uint64_t)at + bytes > block.memory.size()) {
    violate("out of bounds", "%s: shared memory has %zu bytes", doing().c_str(), block.memory.size());
  }
}

void write(const char* operation, Block& block, const Range& range, State state, bool bulk) {
  check_place(operation, block, range.at, range.bytes);
  visit(block, range, true, [&](Cell& cell, uint32_t at) {
    check_write(cell, at);
    if (bulk) check_fenced(cell, at);
    record_write(cell, state, me->actor, me->epoch);
  });
}

// The cells are in flight, and nobody else's until now: nothing to check.
void finish_copy(Block& block, const Range& range, const Barrier& barrier) {
  visit(block, range, true,
        [&](Cell& cell, uint32_t) { record_write(cell, kWritten, barrier.actor, barrier.phase + 1); });
}

void begin_store(const Range& range) {
  check_place("bulk_store", my_block(), range.at, range.bytes);
  visit(my_block(), range, false, [&](Cell& cell, uint32_t at) {
    check_read(cell, at);
    check_fenced(cell, at);
    cell.sources++;
  });
}

void end_store(const Range& range) {
  visit(my_block(), range, false, [&](Cell& cell, uint32_t) {
    cell.sources--;
    record_read(cell);
  });
}

}  // namespace fastgrpo_host

// ---- device.h

namespace fastgrpo {

using namespace fastgrpo_host;

const void* shared_read(uint32_t at, uint32_t bytes) {
  Block& block = my_block();
  check_place("shared_load", block, at, bytes);
  visit(block, {at, bytes}, false, [&](Cell& cell, uint32_t offset) {
    check_read(cell, offset);
    record_read(cell);
  });
  return block.memory.data() + at;
}

void* shared_write(uint32_t at, uint32_t bytes) {
  Block& block = my_block();
  write("shared_store", block, {at, bytes}, kWritten);
  return block.memory.data() + at;
}

void check_global(const void* p, uint32_t bytes, const char* operation) {
  const uintptr_t first = (uintptr_t)p, end = first + bytes;
  if (first % std::min(bytes, 16u)) violate("misaligned", "%s of %u bytes at address %p", operation, bytes, p);
  for (const auto& range : m.allowed) {
    if (range.first <= first && end <= range.second) return;
  }
  violate("out of bounds", "%s of %u bytes at address %p: not in what the test allowed", operation, bytes, p);
}

}  // namespace fastgrpo
