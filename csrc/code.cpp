// From vectors to what is stored of them: scale, groups and weights of the search (scale.cpp), the search itself, and packing. The
// definition is ops/encode/code.py; keys may come rotated, and results may go to pages (ops/encode/pages.py). A vector's result
// depends on no other vector, so it is the same in a prompt, in a step, and in any batch.
#include <algorithm>
#include <atomic>
#include <deque>
#include <vector>

#include "encode.h"
#include "pool.h"
#include "rope.h"
#include "scale.h"

namespace kvfold {
namespace {

constexpr int64_t kMost = 256, kLeast = 8;  // tokens of a piece of work: codebooks are read for as many
constexpr double kAlone = 100e-6;           // seconds of work that one thread has done before another is awake and through
constexpr double kVector = 0.5e-6, kByte = 1e-10;  // seconds that a group's vector takes, and a byte of its codebook that comes from afar

void pack(const int32_t* codes, int64_t count, int bits, uint8_t* to) {
  uint64_t window = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; i++) {
    window |= static_cast<uint64_t>(codes[i]) << filled;
    for (filled += bits; filled >= 8; filled -= 8, window >>= 8) *to++ = static_cast<uint8_t>(window);
  }
  if (filled) *to = static_cast<uint8_t>(window);
}

// What one thread works with, small enough to stay in its caches.
struct Workplace {
  Searcher searcher;
  std::vector<float> vectors;
  std::vector<int32_t> codes;

  Workplace(const Books& books, int64_t beam)
      : searcher(books, beam), vectors(kMost * books.head_dim()), codes(kMost * books.codes()) {}
};

// A call, cut into pieces: `span` tokens of one batch row and head.
struct Job {
  const CodeCall& call;
  Lent<Workplace> places;
  std::vector<float> sines;  // [batch or 1][tokens][2][rotary]
  int64_t pairs, span = kMost, spans = 0, first = 0;

  explicit Job(const CodeCall& call)
      : call(call), places(*call.books, call.beam), pairs(call.scaling.batch * call.scaling.heads) {}

  double seconds() const {
    const Books& books = *call.books;
    return static_cast<double>(pairs * call.scaling.tokens * books.groups * call.beam) * kVector +
           static_cast<double>(books.count * books.size * books.dim * 2) * kByte;
  }

  void share_out(int64_t pieces) {
    const int64_t tokens = call.scaling.tokens;
    while (span > kLeast && pairs * ((tokens + span - 1) / span) < pieces) span /= 2;
    spans = (tokens + span - 1) / span;
  }

  // Of all heads at once.
  void make_sines(int threads) {
    const Turn& turn = call.scaling.turn;
    if (!turn.positions) return;
    const int64_t tokens = call.scaling.tokens, rows = turn.positions_stride ? call.scaling.batch : 1, wide = 2 * turn.rotary;
    sines.resize(rows * tokens * wide);
    parallel_for(tokens < kMost ? 1 : threads, (rows * tokens + kMost - 1) / kMost, [&](int64_t item) {
      for (int64_t i = item * kMost; i < std::min((item + 1) * kMost, rows * tokens); i++)
        sines_of(turn, i / tokens, i % tokens, &sines[i * wide]);
    });
  }

  // False if there is NaN or Inf.
  bool run(int64_t item) {
    const ScaleCall& scaling = call.scaling;
    const Books& books = *call.books;
    const int64_t pair = item / spans, b = pair / scaling.heads, g = pair % scaling.heads, count = books.codes();
    const int64_t start = item % spans * span, some = std::min(span, scaling.tokens - start), width = books.head_dim();
    const Turn& turn = scaling.turn;
    const float* own_sines = turn.positions ? &sines[((turn.positions_stride ? b : 0) * scaling.tokens + start) * 2 * turn.rotary] : nullptr;
    typename Lent<Workplace>::Loan place(places);
    float* const vectors = place->vectors.data();
    int32_t* const codes = place->codes.data();
    const bool finite = scaled_groups(scaling, call.to, b, g, start, some, own_sines, vectors);
    for (int64_t p = 0; p < books.groups; p++)
      for (int64_t t = 0; t < some; t += Searcher::kBlock)
        place->searcher.encode(vectors + t * width + p * books.dim, width, std::min(Searcher::kBlock, some - t), g, p, codes + t * count);
    for (int64_t t = 0; t < some; t++)
      if (call.to.keeps(start + t)) pack(codes + t * count, count, call.bits, call.to.packed_of(b, g, start + t));
    return finite;
  }
};

}  // namespace

void code(const CodeCall* calls, int64_t count, bool checked, int threads) {
  std::deque<Job> jobs;
  double seconds = 0;
  for (int64_t i = 0; i < count; i++) seconds += jobs.emplace_back(calls[i]).seconds();
  if (seconds < kAlone) threads = 1;
  int64_t pieces = 0;
  for (Job& job : jobs) {
    job.make_sines(threads);
    job.share_out((4 * threads + count - 1) / count);
    job.first = pieces;
    pieces += job.pairs * job.spans;
  }
  std::atomic<bool> finite{true};
  parallel_stretches(threads, pieces, [&](int64_t item) {
    size_t i = jobs.size() - 1;
    while (item < jobs[i].first) i--;
    if (!jobs[i].run(item - jobs[i].first)) finite = false;
  });
  if (checked && !finite) throw NonFinite();
}

}  // namespace kvfold
