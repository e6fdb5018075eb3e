// Who knows of what, who touched which bytes of memory, and what a thread may touch.

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

void split(Shadow& shadow, Cell& cell) {
  const int parts = shadow.parts.take();
  for (int i = 0; i < 8; i++) {
    Cell& part = shadow.parts[parts][i] = cell;
    if (i && cell.reader == kSeveral) {
      part.read_time = m.lists.take();
      m.lists[part.read_time] = m.lists[cell.read_time];
    }
  }
  cell.parts = parts;
}

// Calls visitor(cell, offset) for all cells of a range. Where it leaves cells alike, a split one becomes whole again.
template <class Visitor>
void visit(Shadow& shadow, const Range& range, bool alike, Visitor visitor) {
  for (uint32_t at = range.at, end = range.at + range.bytes; at < end;) {
    Cell& cell = shadow.cells[at / 16];
    const uint32_t stop = std::min(end, at / 16 * 16 + 16);
    if (stop - at == 16 && cell.parts < 0) {
      visitor(cell, at);
    } else {
      if (cell.parts < 0) split(shadow, cell);
      std::array<Cell, 8>& parts = shadow.parts[cell.parts];
      for (uint32_t i = at; i < stop; i += 2) visitor(parts[i % 16 / 2], i);
      if (stop - at == 16 && alike) {
        shadow.parts.give(cell.parts);
        cell = parts[0];
      }
    }
    at = stop;
  }
}

// The same for global memory: a range of each page that it touches.
template <class Visitor>
void visit_global(const void* p, uint32_t bytes, bool alike, Visitor visitor) {
  const uintptr_t first = (uintptr_t)p / 2 * 2, end = ((uintptr_t)p + bytes + 1) / 2 * 2;
  for (uintptr_t at = first; at < end;) {
    const uintptr_t page = at / kPage * kPage, stop = std::min(end, page + kPage);
    Shadow& shadow = m.pages[page];
    if (shadow.cells.empty()) shadow.cells.resize(kPage / 16);
    visit(shadow, {(uint32_t)(at - page), (uint32_t)(stop - at)}, alike,
          [&](Cell& cell, uint32_t offset) { visitor(cell, (uint32_t)(page + offset - (uintptr_t)p)); });
    at = stop;
  }
}

// By a thread, or by a copy, which may know nothing of the readers before it.
void record_read(Cell& cell, int actor, uint32_t time, const Thread* thread) {
  if (cell.reader == kNobody || cell.reader == actor ||
      (cell.reader != kSeveral && thread && knows(thread, cell.reader, cell.read_time))) {
    cell.reader = actor;
    cell.read_time = time;
    return;
  }
  if (cell.reader != kSeveral) {
    const int list = m.lists.take();
    m.lists[list] = {{cell.reader, cell.read_time}};
    cell.read_time = list;
    cell.reader = kSeveral;
  }
  std::vector<Read>& list = m.lists[cell.read_time];
  if (list.back().reader == actor) {
    list.back().time = time;
    return;
  }
  list.push_back({(uint16_t)actor, time});
  const size_t readers = m.address ? (size_t)m.cluster * m.threads : m.threads;
  if (list.size() < readers * 2 + 2) return;
  // One entry for each reader, its last.
  std::vector<uint32_t> last((size_t)m.cluster * stride());  // 0: none, as epochs begin at 1
  for (const Read& read : list) last[read.reader] = read.time;
  list.clear();
  for (size_t reader = 0; reader < last.size(); reader++) {
    if (last[reader]) list.push_back({(uint16_t)reader, last[reader]});
  }
}

void record_read(Cell& cell) { record_read(cell, me->actor, me->epoch, me); }

void record_write(Cell& cell, State state, int writer, uint32_t time) {
  if (cell.reader == kSeveral) m.lists.give(cell.read_time);
  cell.reader = kNobody;
  cell.state = state;
  cell.writer = writer;
  cell.write_time = time;
}

// ---- checks

// For messages: an offset in shared memory, or in the global memory of the access that was taken note of.
std::string place(uint32_t at) {
  return m.address ? text("address %p", (const void*)((const char*)m.address + at)) : text("offset %u", at);
}

std::string name_of(int actor) {
  const Block& block = m.blocks[actor / stride()];
  const int index = actor % stride();
  if (index < m.threads) return text("thread %d of block %d", index, block.index);
  return text("a copy that completed on the barrier at offset %u", block.barriers[index - m.threads].at);
}

void check_order(const char* what, int actor, uint32_t time, uint32_t at) {
  if (actor == kNobody || knows(me, actor, time)) return;
  violate("race", "%s: %s was %s by %s, and no synchronisation since", doing().c_str(), place(at).c_str(), what,
          name_of(actor).c_str());
}

void check_state(const Cell& cell, uint32_t at) {
  if (cell.state == kBarrier) violate("barrier", "%s: offset %u belongs to a barrier", doing().c_str(), at);
  if (cell.state == kInFlight) {
    violate("in flight", "%s: a copy to %s is in flight", doing().c_str(), place(at).c_str());
  }
}

void check_read(const Cell& cell, uint32_t at) {
  check_state(cell, at);
  if (cell.state == kUnwritten && !m.address) violate("unwritten", "%s: nobody wrote offset %u", doing().c_str(), at);
  check_order("written", cell.writer, cell.write_time, at);
}

void check_write(const Cell& cell, uint32_t at) {
  check_state(cell, at);
  if (cell.sources) {
    violate("copy source", "%s: a bulk copy reads %s, and nobody waited", doing().c_str(), place(at).c_str());
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

std::string doing() { return text("%s of %u bytes at %s", m.operation, m.range.bytes, place(m.range.at).c_str()); }

void check_place(const char* operation, const Block& block, uint32_t at, uint32_t bytes) {
  m.operation = operation;
  m.address = nullptr;
  m.range = {at, bytes};
  const uint32_t alignment = std::min(bytes, 16u);
  if (at % alignment) violate("misaligned", "%s: not a multiple of %u", doing().c_str(), alignment);
  if ((uint64_t)at + bytes > block.memory.size()) {
    violate("out of bounds", "%s: shared memory has %zu bytes", doing().c_str(), block.memory.size());
  }
}

void write(const char* operation, Block& block, const Range& range, State state, bool bulk) {
  check_place(operation, block, range.at, range.bytes);
  visit(block.shadow, range, true, [&](Cell& cell, uint32_t at) {
    check_write(cell, at);
    if (bulk) check_fenced(cell, at);
    record_write(cell, state, me->actor, me->epoch);
  });
}

// The cells are in flight, and nobody else's until now: nothing to check.
void finish_copy(Block& block, const Range& range, const Barrier& barrier) {
  visit(block.shadow, range, true,
        [&](Cell& cell, uint32_t) { record_write(cell, kWritten, barrier.actor, barrier.phase + 1); });
}

void begin_store(const Range& range) {
  check_place("bulk_store", my_block(), range.at, range.bytes);
  visit(my_block().shadow, range, false, [&](Cell& cell, uint32_t at) {
    check_read(cell, at);
    check_fenced(cell, at);
    cell.sources++;
  });
}

void end_store(const Range& range) {
  m.address = nullptr;
  visit(my_block().shadow, range, false, [&](Cell& cell, uint32_t) {
    cell.sources--;
    record_read(cell);
  });
}

void check_global(const char* operation, const void* p, uint32_t bytes) {
  const uintptr_t first = (uintptr_t)p, end = first + bytes;
  m.operation = operation;
  m.address = p;
  m.range = {0, bytes};
  if (first % std::min(bytes, 16u)) violate("misaligned", "%s", doing().c_str());
  for (const auto& range : m.allowed) {
    if (range.first <= first && end <= range.second) return;
  }
  violate("out of bounds", "%s: not in what the test allowed", doing().c_str());
}

void begin_load(const void* from, uint32_t bytes) {
  check_global("bulk_load", from, bytes);
  visit_global(from, bytes, false, [&](Cell& cell, uint32_t at) {
    check_read(cell, at);
    cell.sources++;
  });
}

void end_load(const void* from, uint32_t bytes, const Barrier& barrier) {
  m.address = from;
  visit_global(from, bytes, false, [&](Cell& cell, uint32_t) {
    cell.sources--;
    record_read(cell, barrier.actor, barrier.phase + 1, nullptr);
  });
}

void write_global(const char* operation, const void* p, uint32_t bytes, State state) {
  check_global(operation, p, bytes);
  visit_global(p, bytes, true, [&](Cell& cell, uint32_t at) {
    check_write(cell, at);
    record_write(cell, state, me->actor, me->epoch);
  });
}

}  // namespace fastgrpo_host

// ---- device.h

namespace fastgrpo {

using namespace fastgrpo_host;

const void* shared_read(uint32_t at, uint32_t bytes) {
  Block& block = my_block();
  check_place("shared_load", block, at, bytes);
  visit(block.shadow, {at, bytes}, false, [&](Cell& cell, uint32_t offset) {
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

void global_read(const void* p, uint32_t bytes) {
  check_global("global_load", p, bytes);
  visit_global(p, bytes, false, [&](Cell& cell, uint32_t at) {
    check_read(cell, at);
    record_read(cell);
  });
}

void global_written(const void* p, uint32_t bytes) { write_global("global_store", p, bytes, kWritten); }

}  // namespace fastgrpo
