// A matrix product over threads: which operand is packed when.

#include <condition_variable>
#include <mutex>

#include "dispatch.h"
#include "product.h"

namespace fastgrpo {
namespace {

constexpr int64_t kPartial = 4 << 20;   // bytes of a segment's sums, for each thread
constexpr int64_t kStreamed = 8 << 20;  // bytes of a result that no cache would keep

class Matmul : Product {
 public:
  Matmul(const FastgrpoMatmul& a, const Products& made) : Product(a, made) {}

  // All of K at a time. Panels go over the threads, each packed by the one that multiplies it.
  void by_panels(int64_t threads) const {
    const Groups rows(*this, 0, a_.M, threads);
    share(panels(), threads, [&](const auto& next) {
      Desk desk(*this, a_.K);
      for (int64_t panel; (panel = next()) >= 0;) {
        pack_right(panel, 0, a_.K, desk.right.data());
        for (int64_t m = 0; m < a_.M; m += kGroup) {
          const int64_t count = std::min(kGroup, a_.M - m);
          multiply(rows.at(m), count, a_.K, desk.right.data(), desk);
          finish(m, count, panel, desk.sums.data(), tiles_.columns);
        }
      }
    });
  }

  // All of K at a time. Groups of rows go over the threads; the right operand is packed before.
  void by_rows(int64_t threads) const {
    const int64_t size = panel_floats(a_.K);
    Floats right(panels() * size);
    share(panels(), threads, [&](const auto& next) {
      for (int64_t panel; (panel = next()) >= 0;) pack_right(panel, 0, a_.K, right.data() + panel * size);
    });
    share((a_.M + kGroup - 1) / kGroup, threads, [&](const auto& next) {
      Desk desk(*this, 0);
      std::vector<float> scratch;
      for (int64_t group; (group = next()) >= 0;) {
        const int64_t m = group * kGroup, count = std::min(kGroup, a_.M - m);
        const Left rows = left(m, count, 0, a_.K, scratch);
        for (int64_t panel = 0; panel < panels(); ++panel) {
          multiply(rows, count, a_.K, right.data() + panel * size, desk);
          finish(m, count, panel, desk.sums.data(), tiles_.columns);
        }
      }
    });
  }

  // Segments of K go over the threads, some rows at a time; their sums are added in the order of K.
  void by_segments(int64_t threads) const {
    const int64_t stride = panels() * tiles_.columns;
    const int64_t most = direct() ? a_.M : kPartial / 4 / kSegment;  // rows that are packed take memory, too
    const int64_t some = std::max<int64_t>(1, std::min({a_.M, most, kPartial / 4 / stride}));
    const int64_t segments = (a_.K + kSegment - 1) / kSegment;
    for (int64_t first = 0; first < a_.M; first += some) {
      const int64_t count = std::min(some, a_.M - first);
      Floats total(count * stride);
      int64_t turn = 0;
      std::mutex mutex;
      std::condition_variable turned;
      share(segments, threads, [&](const auto& next) {
        // All memory comes before the first segment, for whose turn the others wait.
        Desk desk(*this, kSegment);
        Floats partial(count * stride);
        std::vector<float> scratch;
        if (!direct()) scratch.reserve(packed_floats(count, kSegment));
        for (int64_t segment; (segment = next()) >= 0;) {
          const int64_t k = segment * kSegment, K = std::min(kSegment, a_.K - k);
          const Left rows = left(first, count, k, K, scratch);
          for (int64_t panel = 0; panel < panels(); ++panel) {
            pack_right(panel, k, K, desk.right.data());
            for (int64_t m = 0; m < count; m += kGroup) {
              const int64_t here = std::min(kGroup, count - m);
              multiply_segment(rows.from(m, 0), here, K, desk.right.data(), desk.sums.data());
              for (int64_t r = 0; r < here; ++r) {
                std::copy_n(desk.sums.data() + r * tiles_.columns, tiles_.columns,
                            partial.data() + (m + r) * stride + panel * tiles_.columns);
              }
            }
          }
          std::unique_lock<std::mutex> lock(mutex);
          turned.wait(lock, [&] { return turn == segment; });
          lock.unlock();  // nobody else's turn comes before this one says so
          made_.finish(partial.data(), count * stride, nullptr, segment > 0, false, total.data(), kFloat32);
          lock.lock();
          ++turn;
          turned.notify_all();
        }
      });
      for (int64_t panel = 0; panel < panels(); ++panel) {
        finish(first, count, panel, total.data() + panel * tiles_.columns, stride);
      }
    }
  }

  void run(int64_t threads) {
    if (a_.M == 0 || a_.N == 0) return;
    threads = worth(a_.M, threads);
    streams_ = !a_.add && a_.M * a_.N * element_size(a_.out_dtype) >= kStreamed;
    // Segments keep no more threads busy than there are; panels of so much of K fit beside each other while it is
    // short.
    const int64_t segments = (a_.K + kSegment - 1) / kSegment;
    const bool few = segments < std::min(threads, panels()) && panel_floats(a_.K) * 4 <= 2 * kPartial;
    if (a_.K > kDeep && !(few && direct())) return by_segments(threads);
    if (a_.K > kDeep) return by_panels(threads);
    return a_.N > a_.M ? by_panels(threads) : by_rows(threads);
  }
};

}  // namespace
}  // namespace fastgrpo

int32_t fastgrpo_cpu_matmul(const FastgrpoMatmul* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of(
      [&] { fastgrpo::Matmul(*args, *fastgrpo::products_for((fastgrpo::Isa)isa)).run(threads); });
}
